"""What a model cannot do is said from its config.json alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engines.base import UnsupportedModel
from engines.config import DeepSpeedSection, ModelConfig
from engines.modeldir import BadModelDir
from engines.modelfit import misfits, no_model
from engines.models.config import LlamaConfig

LLAMA: dict[str, object] = {
    "model_type": "llama",
    "hidden_size": 128,
    "vocab_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 512,
    "max_position_embeddings": 2048,
}


def model(home: Path, sizes: dict[str, object], **fields: object) -> ModelConfig:
    (home / "config.json").write_text(json.dumps(sizes))
    if not (home / "manifest.json").exists():
        (home / "model.safetensors").touch()
    given = {"model_name": "m", "served_model_names": ("m",), "model_path": str(home)}
    return ModelConfig.model_validate({**given, **fields})


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_what_divides_fits(tmp_path: Path, tp: int) -> None:
    assert misfits(model(tmp_path, LLAMA, tp_size=tp, max_model_len=2048)) == []


@pytest.mark.parametrize(
    ("sizes", "tp", "words"),
    [
        (LLAMA, 3, ["8 attention heads", "for 3 ranks", "one of: 1, 2, 4, 8"]),
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
    assert misfits(by_autotp) == [], "it divides unevenly"
    [problem] = misfits(by_autotp.model_copy(update={"tp_size": 8}))
    assert "4 key/value heads are too few for 8 ranks" in problem
    injected = model(tmp_path, LLAMA, engine="deepspeed_inject", tp_size=3, device="cuda")
    assert len(misfits(injected)) == 2, "its heads are grouped, and 3 ranks cannot share them"
    section = DeepSpeedSection(config="ds.json", fallback="autotp")
    assert misfits(injected.model_copy(update={"deepspeed": section})) == []
    native = model(tmp_path, LLAMA, tp_size=3, deepspeed=section)
    assert len(misfits(native)) == 1, "only injection falls back"
    sizes = LLAMA | {"intermediate_size": 514, "num_key_value_heads": 8}
    odd = model(tmp_path, sizes, engine="deepspeed_inject", tp_size=4, device="cuda")
    [problem] = misfits(odd)
    assert "intermediate size of 514" in problem
    assert misfits(injected.model_copy(update={"engine": "somebodys_own"})) == []


def test_other_names_and_nested_sizes_are_read(tmp_path: Path) -> None:
    sizes: dict[str, object] = {"n_head": 12, "n_layer": 2, "n_positions": 1024}
    for said in (sizes, {"text_config": sizes}):
        type_of_it, heads, length = misfits(model(tmp_path, said, tp_size=5, max_model_len=2000))
        assert ("missing" in type_of_it, "12 attention" in heads, "1024" in length) == (True, True, True)


def test_what_config_json_does_not_say_is_refused_in_the_engines_words(tmp_path: Path) -> None:
    [problem] = misfits(model(tmp_path, {}, tp_size=7, max_model_len=10**6))
    assert problem == engines_words(tmp_path)
    [problem] = misfits(model(tmp_path, {"num_attention_heads": "8"}, tp_size=7))
    assert problem == engines_words(tmp_path)
    [problem] = misfits(model(tmp_path, LLAMA | {"layer_types": 5}))
    assert "config.json: a value is not of its type" in problem


def engines_words(home: Path) -> str:
    with pytest.raises(UnsupportedModel) as refused:
        LlamaConfig.load(home)
    return str(refused.value)


@pytest.mark.parametrize(
    ("kind", "engine", "words"),
    [
        ("qwen3", "native", ["is not llama", "parallelType: pp or pptp", "engine: deepspeed_tp", "custom"]),
        ("qwen3", "pipeline", []),
        ("phi", "pipeline", ["has no pipeline plan", "parallelType: custom"]),
        ("phi", "native", ["is not llama", "engine: deepspeed_tp", "parallelType: custom"]),
        ("mamba", "native", ["is not llama", "serve a model of these types"]),
        ("mamba", "accelerate", ["recurrent state"]),
        ("mixtral", "deepspeed_tp", ["mixture of experts"]),
        ("qwen3", "deepspeed_inject", ["model_type ('qwen3') is not served by injection"]),
    ],
)
def test_types_that_the_engine_refuses(tmp_path: Path, kind: str, engine: str, words: list[str]) -> None:
    sizes = LLAMA | {"model_type": kind, "num_key_value_heads": 8}
    found = misfits(model(tmp_path, sizes, engine=engine, device="cuda"))
    assert len(found) == bool(words)
    assert all(word in found[0] for word in words)
    assert not found or ("pipeline)" in found[0]) == (kind == "qwen3" and engine == "native")
    assert not any("accelerate or" in problem or "engine: deepspeed or" in problem for problem in found)


def test_kernel_injection_on_a_cpu(tmp_path: Path) -> None:
    config = model(tmp_path, LLAMA | {"num_key_value_heads": 8}, engine="deepspeed_inject")
    [problem] = misfits(config)
    assert "deviceType ('cpu') has no injected kernels" in problem
    section = DeepSpeedSection(config=str(tmp_path / "absent.json"), fallback="autotp")
    assert misfits(config.model_copy(update={"deepspeed": section})) == []
    assert misfits(config.model_copy(update={"device": "cuda"})) == []


def make_rank_files(home: Path, tp: int, stages: list[tuple[int, int]], **more: object) -> None:
    """The manifest of a per-rank checkpoint of LLAMA, all that is looked at."""
    sizes = {"vocab_size": 512, "padded_vocab_size": 512, "kv_replicas": 1, "is_tied": False}
    layout = {"tp": tp, "pp": len(stages), "stages": stages, **sizes, **more}
    manifest = {"tool": "t", "format": "sluice", "config": {}, "files": {}, "layout": layout}
    (home / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tp_size": 2}, ""),
        ({"tp_size": 4}, "its files are for tp=2 pp=1, and the group has tp=4 pp=1"),
        ({"tp_size": 4, "reshard": True}, ""),
        ({"tp_size": 2, "stage_split": (4,)}, ""),
        ({"engine": "pipeline", "parallel_type": "pp", "pp_size": 2}, "the group has tp=1 pp=2: run `sluice"),
        ({"engine": "pipeline", "parallel_type": "pp", "pp_size": 2, "reshard": True}, ""),
        ({"engine": "accelerate", "parallel_type": "custom"}, "holds files for ranks"),
        ({"engine": "deepspeed_tp", "tp_size": 2}, "holds files for ranks"),
    ],
)
def test_files_for_ranks_are_for_one_division(tmp_path: Path, fields: dict[str, object], words: str) -> None:
    make_rank_files(tmp_path, 2, [(0, 4)])
    found = misfits(model(tmp_path, LLAMA, **fields))
    assert len(found) == bool(words)
    assert all(words in problem for problem in found)
    assert all("reshard" not in problem or "in model-config.yaml" in problem for problem in found)


def test_stages_of_files_for_ranks(tmp_path: Path) -> None:
    make_rank_files(tmp_path, 1, [(0, 1), (1, 4)])
    config = model(tmp_path, LLAMA, engine="pipeline", parallel_type="pp", pp_size=2)
    [problem] = misfits(config)
    assert "set stageSplit: [1, 3]" in problem
    assert misfits(config.model_copy(update={"stage_split": (1, 3)})) == []
    [problem] = misfits(config.model_copy(update={"stage_split": (1, 1)}))
    assert "adds to 2" in problem
    vast = model(tmp_path, LLAMA | {"num_hidden_layers": 10**9}, engine="pipeline", pp_size=2)
    assert misfits(vast) == [], "numbers that nobody checked are not worked with"


def test_fp8_is_not_for_a_cpu(tmp_path: Path) -> None:
    make_rank_files(tmp_path, 1, [(0, 4)], quantization="fp8")
    config = model(tmp_path, LLAMA)
    [problem] = misfits(config)
    assert "is quantised to fp8, which is served on GPUs" in problem
    assert misfits(config.model_copy(update={"device": "cuda"})) == []


def test_weights_that_are_not_safetensors(tmp_path: Path) -> None:
    config = model(tmp_path, LLAMA)
    (tmp_path / "model.safetensors").rename(tmp_path / "consolidated.00.pth")
    [problem] = misfits(config)
    command = f"sluice convert {tmp_path} {tmp_path}-hf --to hf"
    assert problem.startswith(f"{tmp_path / 'consolidated.00.pth'}: run `{command}`, and serve {tmp_path}-hf")


def test_other_types_in_pickles_are_for_transformers(tmp_path: Path) -> None:
    config = model(tmp_path, LLAMA | {"model_type": "qwen2"}, engine="accelerate")
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    [problem] = misfits(config)
    assert problem.startswith(f"{tmp_path / 'pytorch_model.bin'}: load it with transformers, and save it")
    assert "sluice convert" not in problem


@pytest.mark.parametrize(
    ("settings", "target", "options"),
    [
        ({}, "sluice", "--to sluice"),
        ({"tp_size": 4}, "sluice", "--to sluice --tp 4"),
        ({"engine": "pipeline", "pp_size": 3, "tp_size": 2}, "sluice", "--to sluice --tp 2 --pp 3"),
        (
            {"engine": "pipeline", "pp_size": 2, "stage_split": (1, 3)},
            "sluice",
            "--to sluice --pp 2 --stage-split 1,3",
        ),
        ({"engine": "deepspeed_tp", "tp_size": 2}, "hf", "--to hf"),
    ],
)
def test_of_metas_format_the_command_that_makes_what_this_group_reads(
    tmp_path: Path, settings: dict[str, Any], target: str, options: str
) -> None:
    root = tmp_path / "my model"
    root.mkdir()
    config = model(root, LLAMA, **settings)
    (root / "config.json").unlink()
    (root / "model.safetensors").rename(root / "consolidated.00.pth")
    command = f"sluice convert '{root}' '{root}-{target}' {options}"
    assert f"run `{command}`, and serve {root}-{target}" in no_model(config)


def test_weights_without_a_config_need_theirs(tmp_path: Path) -> None:
    config = model(tmp_path, LLAMA)
    (tmp_path / "config.json").unlink()
    assert "remedy: put the config.json there that belongs to the weights" in no_model(config)
    (tmp_path / "model.safetensors").unlink()
    assert "give a local model directory in Hugging Face format" in no_model(config)


def test_problems_carry_their_line(tmp_path: Path) -> None:
    places = (("parallelType", "m.yaml:3"), ("parallelLevel", "m.yaml:4"), ("maxModelLen", "m.yaml:5"))
    config = model(tmp_path, LLAMA, tp_size=3, max_model_len=9999, source="m.yaml", places=places)
    assert [problem.split(" ")[0] for problem in misfits(config)] == ["m.yaml:4:", "m.yaml:5:"]


def test_what_is_no_configuration_is_named(tmp_path: Path) -> None:
    config = model(tmp_path, {})
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(BadModelDir, match=r"config\.json"):
        misfits(config)


def test_needs_no_torch() -> None:
    code = "import sys; import engines.modelfit; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
