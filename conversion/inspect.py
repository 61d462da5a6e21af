"""What a checkpoint is, from its headers."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Iterator
from math import prod

from conversion import families
from conversion.sidecar import model_config_yaml
from conversion.sizes import shown_bytes
from conversion.source import Choices, Source
from engines.models.config import LlamaConfig
from engines.models.names import expected_tensors, indivisible

_SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 32)


def describe(source: Source) -> Iterator[tuple[str, str]]:
    """(label, value) in the order in which people ask, of the tensors that have no problem."""
    config = source.config
    count = sum(prod(tensor.shape) for tensor in source.tensors.values())
    num_bytes = sum(tensor.num_bytes for tensor in source.tensors.values())
    dtypes = Counter(tensor.dtype for tensor in source.tensors.values())
    yield "family", family(config)
    of = f" of the {_num_parameters(config):,} that it should have" if source.problems else ""
    yield "parameters", f"{count:,} ({shown_bytes(num_bytes)}){of}"
    yield "format", f"{source.format}: {source.layout}"
    yield "dtypes", ", ".join(f"{dtype} ({number} tensors)" for dtype, number in sorted(dtypes.items()))
    yield "layers", f"{config.num_layers} of hidden size {config.hidden_size}, mlp {config.intermediate_size}"
    yield "heads", f"{config.num_heads} query, {config.num_kv_heads} key/value, of {config.head_dim}"
    yield "vocabulary", f"{config.vocab_size}{', tied' if config.tie_word_embeddings else ''}"
    yield "rope", f"theta {config.rope.theta:g}{_scaling(config)}, {config.max_positions} positions"
    if not source.problems:
        yield "left out", ", ".join(source.ignored) or "nothing"
    yield "tp that fits", _fitting(config)
    yield "pp that fits", f"1 to {config.num_layers}"
    for note in source.notes:
        yield "note", note


def _num_parameters(config: LlamaConfig) -> int:
    return sum(prod(spec.shape) for spec in expected_tensors(config).values())


def family(config: LlamaConfig) -> str:
    """The release that this looks like."""
    if config.vocab_size == families.LLAMA3_VOCAB:
        scaling = config.rope.llama3
        return "Llama 3" if scaling is None else "Llama 3.2" if scaling.factor == 32 else "Llama 3.1 or 3.3"
    if config.vocab_size == 32000 and config.rope.theta == 10000.0:
        return "Llama 1" if config.rms_norm_eps == 1e-6 else "Llama 2"
    return "Llama architecture"


def _scaling(config: LlamaConfig) -> str:
    scaling = config.rope.llama3
    if scaling is not None:
        return f", llama3 scaling by {scaling.factor:g}"
    return f", linear scaling by {config.rope.divisor:g}" if config.rope.divisor != 1.0 else ""


def _fitting(config: LlamaConfig) -> str:
    sizes = [tp for tp in _SIZES if indivisible(config, tp) is None]
    replicated = [tp for tp in sizes if tp > config.num_kv_heads]
    note = f" (key/value heads are replicated at {', '.join(map(str, replicated))})" if replicated else ""
    return ", ".join(map(str, sizes)) + note


def ready_config(source: Source, choices: Choices) -> str:
    """A model-config.yaml that serves this directory as it is; a comment where the server cannot.

    `choices`: what the source was opened with, and has to be converted with."""
    root = source.root.resolve()
    if any(path.suffix != ".safetensors" for path in source.files):
        words = ["sluice", "convert", str(root), f"{root}-sluice", "--to", "sluice", *choices.options]
        return f"# the server reads safetensors only: run `{shlex.join(words)}`, and serve {root}-sluice\n"
    is_divided = source.manifest is not None and source.format == "sluice"
    layout = source.manifest.layout if source.manifest and is_divided else None
    return model_config_yaml(layout, json.dumps(str(root)))
