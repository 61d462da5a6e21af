"""Whether a model can be divided and run as a configuration says, from its config.json alone. Torch-free.

It says before anything starts what the engines would say after seconds; they check again, with all they know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from engines import modeldir
from engines.config import ModelConfig
from engines.modeldir import Shape


def misfits(config: ModelConfig) -> list[str]:
    """What cannot work, each with its remedy. Engines of other distributions are left to themselves.

    Raises BadModelDir when there is no config.json, or it is none."""
    shape = modeldir.shape(config.model_path)
    return [*_indivisible(config, shape), *_too_many_stages(config, shape), *_too_long(config, shape)]


def _indivisible(config: ModelConfig, shape: Shape) -> Iterator[str]:
    fallback = config.deepspeed is not None and config.deepspeed.fallback is not None
    falls_back = fallback and config.engine == "deepspeed_inject"
    find = _WHY_NOT.get("deepspeed_tp" if falls_back else config.engine)
    why = find(shape, config.tp_size) if find else None
    if find is None or why is None:
        return
    sizes = ", ".join(str(size) for size in range(1, config.tp_size) if find(shape, size) is None)
    name = "tensorParallel (or parallelLevel, nproc-per-node)" if config.source else "--tp"
    yield f"{why} for {config.tp_size} ranks; remedy: set {name} to one of: {sizes}"


def _cannot_share(shape: Shape, tp: int) -> str | None:
    heads, kv_heads, inner = shape.num_heads, shape.num_kv_heads, shape.intermediate_size
    if heads and heads % tp:
        return f"the model's {heads} attention heads cannot be shared evenly"
    if kv_heads and kv_heads % tp and tp % kv_heads:
        return f"the model's {kv_heads} key/value heads cannot be shared evenly"
    if inner and inner % tp:
        return f"the model's intermediate size of {inner} cannot be shared evenly"
    return None


def _too_few_heads(shape: Shape, tp: int) -> str | None:
    heads = shape.num_kv_heads
    return f"the model's {heads} key/value heads are too few" if heads and heads < tp else None


_WHY_NOT: dict[str, Callable[[Shape, int], str | None]] = {
    "native": _cannot_share,
    "pipeline": _cannot_share,
    "deepspeed_tp": _too_few_heads,
    "deepspeed_inject": _cannot_share,
}


def _too_many_stages(config: ModelConfig, shape: Shape) -> Iterator[str]:
    if config.engine == "pipeline" and shape.num_layers and config.pp_size > shape.num_layers:
        name = "pipelineParallel (or parallelLevel, nproc-per-node)" if config.source else "--pp"
        wrong = f"{config.pp_size} pipeline stages, but the model has {shape.num_layers} layers"
        yield f"{wrong}; remedy: set {name} to {shape.num_layers} or less"


def _too_long(config: ModelConfig, shape: Shape) -> Iterator[str]:
    longest = shape.max_positions
    is_ours = config.engine in _WHY_NOT or config.engine == "accelerate"
    if is_ours and longest and config.max_model_len and config.max_model_len > longest:
        name = "maxModelLen" if config.source else "--max-model-len"
        wrong = f"{name} is {config.max_model_len}, but the model was made for {longest} positions"
        yield f"{wrong} (max_position_embeddings); remedy: set it to {longest} or less"
