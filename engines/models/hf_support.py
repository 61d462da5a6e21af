"""Which Hugging Face models paged attention serves exactly, told from config.json as data. Torch-free.

A type is served when it is known to be exact: causal attention over all earlier tokens, through the
attention function that transformers lets one register. All others are refused by name, with the reason
where one is known. What data cannot tell, engines/models/hf_inspect.py asks the model's class.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engines.base import UnsupportedModel
from engines.modeldir import read_json

EXACT_TYPES = (
    "arcee",
    "cohere",
    "ernie4_5",
    "gemma",
    "glm",
    "glm4",
    "granite",
    "helium",
    "llama",
    "mistral",
    "nemotron",
    "olmo",
    "olmo2",
    "phi",
    "phi3",
    "qwen2",
    "qwen3",
    "seed_oss",
    "smollm3",
    "stablelm",
    "starcoder2",
)
"""Each is compared with `generate` by tests/engines/models/test_hf.py."""

_ENCODER = "is an encoder-decoder, and only decoders are served"
_REASONS = {
    _ENCODER: ("t5", "mt5", "umt5", "bart", "mbart", "marian", "pegasus", "blenderbot", "m2m_100", "led"),
    "biases attention by distance (ALiBi), which paged attention does not": ("bloom", "mpt"),
    "keeps a recurrent state in place of, or beside, keys and values": (
        *("mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm", "recurrent_gemma", "jamba", "bamba", "zamba"),
        *("zamba2", "falcon_h1", "lfm2", "nemotron_h", "granitemoehybrid", "qwen3_next", "qwen3_5_text"),
        *("minimax", "kimi_linear", "olmo_hybrid"),
    ),
    "compresses its keys and values (multi-head latent attention, MLA)": (
        *("deepseek_v2", "deepseek_v3", "deepseek_v32", "minicpm3", "longcat_flash", "youtu"),
    ),
    "soft-caps its attention scores, which paged attention does not": ("gemma2", "vaultgemma"),
    "has attention sinks, which paged attention lacks": ("gpt_oss",),
    "has attention of its own that cannot be exchanged for the paged one": (
        *("falcon", "gptj", "codegen", "gpt_bigcode", "gpt_neo", "gpt2", "opt", "ctrl", "xlnet"),
    ),
    "is a mixture of experts, which this engine does not serve": (
        *("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe", "dbrx", "granitemoe", "jetmoe"),
        *("glm4_moe", "ernie4_5_moe"),
    ),
    "has layers with different attention windows or chunks": (
        *("gemma3", "gemma3_text", "gemma3n_text", "cohere2", "exaone4", "olmo3", "llama4", "llama4_text"),
    ),
}
WITHOUT_PIPELINE_PLAN = ("nemotron", "phi", "stablelm")
"""Of EXACT_TYPES, those whose classes in transformers do not say how to cut them into stages."""

REASONS = {kind: reason for reason, kinds in _REASONS.items() for kind in kinds}

EXACT_ROPES = ("default", "linear", "llama3", "yarn", "dynamic", "longrope")
"""The last two depend on the longest position in a batch: hf_inspect bounds it so that they do not."""

_EXACT_LAYERS = frozenset(("full_attention", "sliding_attention"))
_HARMLESS_PRIVATE = frozenset(("_name_or_path", "_attn_implementation_autoset", "_commit_hash"))
ONE_PROCESS = "serve it in one process (parallelType: custom, engine: accelerate)"
_REMEDY = "serve a model of these types: " + ", ".join(EXACT_TYPES)


def read_config(model_dir: str | Path) -> dict[str, Any]:
    """config.json of a model that may be served, as data, without private keys.

    Raises UnsupportedModel naming file, key, reason and remedy; BadModelDir.
    """
    path = Path(model_dir) / "config.json"
    data = read_json(path)
    _refuse_code(path, data)
    _refuse_adapter(path)
    _refuse_type(path, data)
    _refuse_layers(path, data)
    return {key: value for key, value in data.items() if not key.startswith("_")}


def other_engines(kind: object) -> str:
    """The remedy for a model of this type that the native Llama is not: which engines serve it."""
    if kind not in EXACT_TYPES:
        return _REMEDY
    in_stages = kind != "llama" and kind not in WITHOUT_PIPELINE_PLAN
    pipeline = "parallelType: pp or pptp (--pp; engine pipeline), " if in_stages else ""
    return (
        f"write {pipeline}engine: deepspeed_tp (needs the extra deepspeed: pip install -e '.[deepspeed]') or "
        "parallelType: custom (engine accelerate; needs the extra accelerate: pip install -e '.[accelerate]')"
    )


def no_pipeline_plan(model_dir: str | Path, kind: object) -> UnsupportedModel:
    """The refusal of a type that cannot be cut into stages."""
    return UnsupportedModel(
        f"{model_dir}: model_type {kind!r} has no pipeline plan of embed_tokens, layers and norm: "
        + ONE_PROCESS
    )


def refuse(path: Path, key: str, value: object, why: str, remedy: str) -> UnsupportedModel:
    """The error, in the shape that all refusals have."""
    return UnsupportedModel(f"{path}: {key} ({value!r}) {why}: {remedy}")


def _refuse_code(path: Path, data: dict[str, Any]) -> None:
    """What would have transformers run code that came with, or is named by, the model directory."""
    for key in ("auto_map", "custom_generate", "custom_pipelines"):
        if data.get(key):
            remedy = "use a checkpoint that transformers runs without it, or remove the key if its type does"
            raise refuse(path, key, data[key], "names code of the model's own, which is never run", remedy)
    named = [key for key in data if key.startswith("_") and key not in _HARMLESS_PRIVATE]
    named += [key for key in ("attn_implementation", "experts_implementation") if data.get(key) is not None]
    for key in named:
        raise refuse(path, key, data[key], "sets internals of transformers from data", "remove the key")
    if data.get("quantization_config") is not None:
        remedy = "use the bf16 or fp16 checkpoint"
        raise refuse(path, "quantization_config", "...", "means quantised weights", remedy)


def _refuse_adapter(path: Path) -> None:
    adapter = path.with_name("adapter_config.json")
    if adapter.exists():
        raise UnsupportedModel(f"{adapter}: adapters are not served: merge the adapter into the weights")


def _refuse_type(path: Path, data: dict[str, Any]) -> None:
    kind = data.get("model_type")
    if isinstance(kind, str) and kind in EXACT_TYPES:
        if data.get("is_encoder_decoder"):
            raise refuse(path, "is_encoder_decoder", True, _ENCODER, _REMEDY)
        return
    if isinstance(kind, str) and kind in REASONS:
        raise refuse(path, "model_type", kind, REASONS[kind], _REMEDY)
    if data.get("is_encoder_decoder"):
        raise refuse(path, "model_type", kind, _ENCODER, _REMEDY)
    raise refuse(
        path, "model_type", kind, "is not among those known to be exact with paged attention", _REMEDY
    )


def _refuse_layers(path: Path, data: dict[str, Any]) -> None:
    kinds = data.get("layer_types") or ()
    for kind in kinds:
        if kind not in _EXACT_LAYERS:
            raise refuse(path, "layer_types", kind, "is attention that paging would get wrong", _REMEDY)
    if data.get("is_causal") is False:
        why = "lets tokens attend to later ones, which paging does not"
        raise refuse(path, "is_causal", False, why, _REMEDY)
    for key in ("attn_logit_softcapping", "attention_chunk_size"):
        if data.get(key) is not None:
            raise refuse(path, key, data[key], "changes attention in a way that paging does not", _REMEDY)
