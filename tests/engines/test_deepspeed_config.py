"""The DeepSpeed JSON file: what acts, what is ignored with a reason, what is refused at which line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engines.config import ConfigError, ModelConfig, load
from engines.config_deepspeed import DeepSpeedFile, load_settings

YAML = "parallelType: tp\nparallelLevel: 2\ndeviceType: cpu\ndeepspeed:\n  config: ds-config.json\n"


def settings(tmp_path: Path, content: object, dtype: str | None = None) -> DeepSpeedFile:
    file = tmp_path / "ds-config.json"
    file.write_text(json.dumps(content, indent=1))
    return load_settings(file, 2, dtype)


def configured(tmp_path: Path, content: object, extra: str = "") -> ModelConfig:
    (tmp_path / "ds-config.json").write_text(json.dumps(content, indent=1))
    (tmp_path / "model-config.yaml").write_text(YAML + extra)
    return load(tmp_path / "model-config.yaml")


def test_what_acts(tmp_path: Path) -> None:
    content = {
        "dtype": "torch.bfloat16",
        "tp": {"tp_size": 2, "tp_grain_size": 32},
        "max_tokens": 2048,
        "kernel_inject": True,
    }
    expected = DeepSpeedFile(
        kernel_inject=True, dtype="bfloat16", tp_grain_size=32, max_out_tokens=2048, enable_cuda_graph=False
    )
    assert settings(tmp_path, content) == expected


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"dtyp": "fp16"}, r":2: dtyp is not a key.*did you mean 'dtype'"),
        (
            {"tensor_parallel": {"tp_size": 3}},
            r":3: tensor_parallel\.tp_size is 3, but the group has 2 ranks",
        ),
        ({"tp": {"tp_sise": 2}}, r":3: tensor_parallel\.tp_sise is unknown.*did you mean 'tp_size'"),
        ({"mp_size": 4}, r":2: mp_size is 4.*set it to 2"),
        ({"dtype": "int8"}, r":2: dtype is 'int8'.*quantised weights are not served"),
        ({"tp": {}, "tensor_parallel": {}}, "one key.*keep one"),
        ({"replace_with_kernel_inject": "yes"}, "'yes'; allowed: true, false"),
        ({"injection_policy": {"a": "b"}}, "objects of a Python program.*remove the key"),
        ({"quant": {"enabled": True}}, "quant is .*would change what is served"),
        ({"zero": {"stage": 3}}, "zero is .*would change what is served"),
        ({"enable_cuda_graph": True}, "does not work with 2 ranks"),
        ({"max_out_tokens": 0}, "max_out_tokens is 0; allowed: a whole number above 0"),
        ([], ":1: is not a JSON object"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(tmp_path: Path, content: object, expected: str) -> None:
    with pytest.raises(ConfigError, match=rf"ds-config\.json.*{expected}"):
        settings(tmp_path, content)


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        settings(tmp_path, {"dtyp": 1, "mp_size": 3, "max_out_tokens": -1})
    assert len(error.value.problems) == 3


def test_two_dtypes_conflict(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="dtype is fp16, but the YAML's dtype is bfloat16"):
        settings(tmp_path, {"dtype": "fp16"}, "bfloat16")
    assert settings(tmp_path, {"dtype": "bf16"}, "bfloat16").dtype == "bfloat16"
    with pytest.raises(ConfigError, match=r"model-config\.yaml:5: deepspeed\.config: .*the YAML's dtype"):
        configured(tmp_path, {"dtype": "fp16"}, "dtype: bf16\n")


def test_the_files_dtype_is_served(tmp_path: Path) -> None:
    assert configured(tmp_path, {"dtype": "torch.float16"}).dtype == "float16"
    assert configured(tmp_path, {}).dtype == "auto"


def test_ignored_keys_are_listed_with_the_reason(tmp_path: Path) -> None:
    content = {"dtype": "fp32", "base_dir": "/x", "replace_method": "auto"}
    config = configured(tmp_path, content, "  checkpoint: checkpoints.json\n")
    text = "\n".join(config.warnings)
    assert "ds-config.json:3: base_dir has no effect: weights are read from the model's directory" in text
    assert "replace_method has no effect" in text
    assert "deepspeed.checkpoint: has no effect: weights are read from the model's safetensors" in text


def test_the_fallback_is_a_key_of_the_section(tmp_path: Path) -> None:
    config = configured(tmp_path, {"kernel_inject": True}, "  fallback: autotp\n")
    assert config.engine == "deepspeed_inject"
    assert config.deepspeed is not None
    assert config.deepspeed.fallback == "autotp"
    with pytest.raises(ConfigError, match="remedy: give one of autotp"):
        configured(tmp_path, {}, "  fallback: native\n")


def test_what_only_injection_reads_is_listed_under_autotp(tmp_path: Path) -> None:
    content = {"max_tokens": 512, "enable_cuda_graph": True}
    one_rank = "  fallback: autotp\n"
    (tmp_path / "ds-config.json").write_text(json.dumps(content, indent=1))
    (tmp_path / "model-config.yaml").write_text(YAML.replace("Level: 2", "Level: 1") + one_rank)
    config = load(tmp_path / "model-config.yaml")
    assert config.engine == "deepspeed_tp"
    text = "\n".join(config.warnings)
    assert "ds-config.json:2: max_out_tokens has no effect: AutoTP's K/V is paged" in text
    assert "ds-config.json:3: enable_cuda_graph has no effect" in text
    assert "deepspeed.fallback: has no effect: engine deepspeed_tp is AutoTP already" in text
    injected = configured(tmp_path, {"max_tokens": 512, "kernel_inject": True}, one_rank)
    assert injected.warnings == ()


@pytest.mark.parametrize(("engine", "inject"), [("deepspeed_tp", True), ("deepspeed_inject", False)])
def test_an_engine_that_the_file_speaks_against(tmp_path: Path, engine: str, inject: bool) -> None:
    with pytest.raises(ConfigError, match=f"is {engine}, but the DeepSpeed file says"):
        configured(tmp_path, {"replace_with_kernel_inject": inject}, f"engine: {engine}\n")
