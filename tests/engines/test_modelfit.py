"""What a model cannot do is said from its config.json alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from engines.config import DeepSpeedSection, ModelConfig
from engines.modeldir import BadModelDir
from engines.modelfit import misfits

LLAMA: dict[str, object] = {
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 512,
    "max_position_embeddings": 2048,
}


def model(home: Path, sizes: dict[str, object], **fields: object) -> ModelConfig:
    (home / "config.json").write_text(json.dumps(sizes))
    given = {"model_name": "m", "served_model_names": ("m",), "model_path": str(home)}
    return ModelConfig.model_validate({**given, **fields})


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_what_divides_fits(tmp_path: Path, tp: int) -> None:
    assert misfits(model(tmp_path, LLAMA, tp_size=tp, max_model_len=2048)) == []


@pytest.mark.parametrize(
    ("sizes", "tp", "words"),
    [
        (LLAMA, 3, ["8 attention heads", "for 3 ranks", "one of: 1, 2"]),
        (LLAMA, 99, ["8 attention heads", "one of: 1, 2, 4, 8"]),
        (LLAMA | {"num_attention_heads": 12, "num_key_value_heads": 4}, 6, ["4 key/value heads", "1, 2, 4"]),
        (LLAMA | {"intermediate_size": 514}, 4, ["intermediate size of 514", "one of: 1, 2"]),
    ],
)
def test_what_does_not_divide_is_named_with_what_does(
    tmp_path: Path, sizes: dict[str, object], tp: int, words: list[str]
) -> None:
    [problem] = misfits(model(tmp_path, sizes, tp_size=tp))
    assert all(word in problem for word in [*words, "--tp"])
    [problem] = misfits(model(tmp_path, sizes, tp_size=tp, source="m.yaml"))
    assert "parallelLevel" in problem


def test_more_stages_than_layers(tmp_path: Path) -> None:
    config = model(tmp_path, LLAMA, parallel_type="pp", engine="pipeline", pp_size=99, source="m.yaml")
    [problem] = misfits(config)
    assert "99 pipeline stages, but the model has 4 layers" in problem
    assert misfits(config.model_copy(update={"pp_size": 4})) == []


def test_longer_than_the_model_was_made_for(tmp_path: Path) -> None:
    [problem] = misfits(model(tmp_path, LLAMA, max_model_len=100_000))
    assert "--max-model-len is 100000" in problem
    assert "2048 or less" in problem


def test_each_engine_has_its_own_rule(tmp_path: Path) -> None:
    by_autotp = model(tmp_path, LLAMA, engine="deepspeed_tp", tp_size=3)
    assert misfits(by_autotp) == []
    [problem] = misfits(by_autotp.model_copy(update={"tp_size": 8}))
    assert "4 key/value heads are too few for 8 ranks" in problem
    injected = model(tmp_path, LLAMA, engine="deepspeed_inject", tp_size=3)
    assert len(misfits(injected)) == 1
    section = DeepSpeedSection(config="ds.json", fallback="autotp")
    assert misfits(injected.model_copy(update={"deepspeed": section})) == []
    native = model(tmp_path, LLAMA, tp_size=3, deepspeed=section)
    assert len(misfits(native)) == 1, "only injection falls back"
    odd = model(tmp_path, LLAMA | {"intermediate_size": 514}, engine="deepspeed_inject", tp_size=4)
    assert "intermediate size of 514" in misfits(odd)[0]
    assert misfits(injected.model_copy(update={"engine": "somebodys_own"})) == []


def test_other_names_and_nested_sizes_are_read(tmp_path: Path) -> None:
    sizes: dict[str, object] = {"n_head": 12, "n_layer": 2, "n_positions": 1024}
    assert len(misfits(model(tmp_path, sizes, tp_size=5, max_model_len=2000))) == 2
    assert len(misfits(model(tmp_path, {"text_config": sizes}, tp_size=5, max_model_len=2000))) == 2


def test_what_config_json_does_not_say_is_left_to_the_engine(tmp_path: Path) -> None:
    assert misfits(model(tmp_path, {}, tp_size=7, max_model_len=10**6)) == []
    assert misfits(model(tmp_path, {"num_attention_heads": "8"}, tp_size=7)) == []


def test_what_is_no_configuration_is_named(tmp_path: Path) -> None:
    config = model(tmp_path, {})
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(BadModelDir, match=r"config\.json"):
        misfits(config)


def test_needs_no_torch() -> None:
    code = "import sys; import engines.modelfit; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
