"""What DeepSpeed and its injected kernels can serve, told from configuration and config.json. Torch-free."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engines.base import UnsupportedModel
from engines.config import ModelConfig
from engines.config_deepspeed import DeepSpeedFile, load_settings
from engines.models.hf_support import read_config

FAMILIES = ("llama",)
"""Whose layers are known. DeepSpeed injects others, too; those are not served this way."""

AUTOTP = (
    "use AutoTP: in the file of deepspeed.config set replace_with_kernel_inject to false, or in the YAML "
    "deepspeed.fallback to autotp; where there is no such file, write engine: deepspeed_tp"
)


def settings_of(config: ModelConfig) -> DeepSpeedFile:
    """What the user's DeepSpeed JSON says; DeepSpeed's defaults without one. Raises ConfigError."""
    if config.deepspeed is None:
        return DeepSpeedFile(kernel_inject=True)
    return load_settings(config.deepspeed.config, config.world_size, config.dtype)


def check_dtype(dtype: str, device: str) -> None:
    """Raises UnsupportedModel where DeepSpeed does not serve the type."""
    if (dtype, device) == ("float16", "cpu"):
        raise UnsupportedModel(
            "DeepSpeed does not serve float16 on CPUs: set dtype to bfloat16 or float32, in the file of "
            "deepspeed.config where it names one and else in the YAML"
        )


def check_support(config: ModelConfig, settings: DeepSpeedFile) -> None:
    """The support matrix: raises UnsupportedModel with the remedy, or BadModelDir. Reads config.json only."""
    check_kernels(config, settings)
    path, data = Path(config.model_path) / "config.json", read_config(config.model_path)
    for key in ("num_attention_heads", "intermediate_size"):  # and hidden_size, which heads make up
        size = data.get(key, config.tp_size)
        if size % config.tp_size:
            why = f"cannot be shared evenly by {config.tp_size} ranks"
            raise _refusal(
                config, f"{path}: {key}", size, why, f"set parallelLevel to a divisor of it, or {AUTOTP}"
            )


def why_autotp(config: ModelConfig, settings: DeepSpeedFile) -> UnsupportedModel | None:
    """Why AutoTP serves instead: the kernels cannot, and the user allowed it (`deepspeed.fallback`). Raises
    BadModelDir."""
    if config.deepspeed is None or config.deepspeed.fallback != "autotp":
        return None
    try:
        check_support(config, settings)
    except UnsupportedModel as refusal:
        return refusal
    return None


def check_kernels(config: ModelConfig, settings: DeepSpeedFile) -> None:
    """The same, whatever the number of ranks."""
    if config.device != "cuda":
        raise _refusal(
            config, "deviceType", config.device, "has no injected kernels; they are CUDA's", AUTOTP
        )
    if settings.enable_cuda_graph:
        why = "replays one shape, and prompts have many"
        raise _refusal(config, "enable_cuda_graph", True, why, "set it to false")
    path = Path(config.model_path) / "config.json"
    data = read_config(config.model_path)
    for key, value, why in _unsupported(data):
        raise _refusal(config, f"{path}: {key}", value, why, AUTOTP)
    _check_lengths(config, settings)


def _unsupported(data: dict[str, Any]) -> list[tuple[str, object, str]]:
    """(key, value, reason) of what the kernels of these families get wrong, most telling first."""
    found: list[tuple[str, object, str]] = []
    kind, heads = data.get("model_type"), data.get("num_attention_heads")
    if kind not in FAMILIES:
        found.append(("model_type", kind, f"is not served by injection, only {', '.join(FAMILIES)}"))
    kv_heads = data.get("num_key_value_heads", heads)
    if kv_heads != heads:
        why = f"is not num_attention_heads ({heads}): the container drops grouped heads (DeepSpeed #4261)"
        found.append(("num_key_value_heads", kv_heads, why))
    rope = _rope_type(data)
    if rope not in (None, "default"):
        found.append(("rope_type", rope, "scales positions, which the kernels do not"))
    if isinstance(heads, int) and data.get("head_dim") not in (None, data.get("hidden_size", 0) // heads):
        found.append(("head_dim", data["head_dim"], "is not hidden_size / num_attention_heads"))
    for key in ("attention_bias", "mlp_bias"):
        if data.get(key):
            found.append((key, True, "means biases, which the container drops"))
    if data.get("hidden_act", "silu") != "silu":
        found.append(("hidden_act", data["hidden_act"], "is not the silu that the kernels compute"))
    return found


def _rope_type(data: dict[str, Any]) -> object:
    """Under any of the names that config.json has had for it."""
    for key in ("rope_parameters", "rope_scaling"):
        rope = data.get(key)
        if isinstance(rope, dict):
            return rope.get("rope_type", rope.get("type"))
    return None


def _check_lengths(config: ModelConfig, settings: DeepSpeedFile) -> None:
    wanted, limit = config.max_model_len, settings.max_out_tokens
    if wanted is not None and wanted > limit:
        why = f"is more than max_out_tokens ({limit}), which sizes the kernels' K/V"
        remedy = f"set max_out_tokens to {wanted} in the DeepSpeed file, or maxModelLen to {limit} or less"
        raise _refusal(config, "maxModelLen", wanted, why, remedy)


def _refusal(config: ModelConfig, key: str, value: object, why: str, remedy: str) -> UnsupportedModel:
    asked_by = f" ({config.deepspeed.config})" if config.deepspeed else ""
    return UnsupportedModel(f"kernel injection{asked_by}: {key} ({value!r}) {why}: {remedy}")
