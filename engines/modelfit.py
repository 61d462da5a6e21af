"""Whether a model can be divided and run as a configuration says, from config.json and manifest.json alone.

Torch-free. It says before anything starts what the engines would say after seconds, in their own words where
they refuse the model or its files; they check again, with all they know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from engines import modeldir
from engines.base import BadCheckpoint, UnsupportedModel
from engines.config import ConfigError, ModelConfig
from engines.config_deepspeed import DeepSpeedFile
from engines.modeldir import Shape
from engines.models import hf_support, injection, layout
from engines.models.config import LlamaConfig, is_llama
from engines.models.stages import BadSplit, sizes_of, split_layers

_TP_KEYS = ("tensorParallel", "parallelLevel", "torchrun.nproc-per-node", "parallelType")
_PP_KEYS = ("pipelineParallel", *_TP_KEYS[1:])
MODEL_KEYS = ("modelPath", "handler.model_path")
_ENGINE_KEYS = ("engine", "deepspeed.config", "parallelType", *MODEL_KEYS)
_MAX_RANKS = 1024  # that a file may ask for
_MAX_LAYERS = 1024  # config.json may claim any number, and dividing them takes time
_FEW = 8  # sizes that are named one by one


def misfits(config: ModelConfig) -> list[str]:
    """What cannot work, each with place and remedy. Engines of other distributions are left to themselves.

    Raises BadModelDir when there is no config.json, or it is none."""
    config = with_fallback(config)
    shape = modeldir.shape(config.model_path)
    checks = (_refusals, _indivisible, _too_many_stages, _too_long)
    return [problem for check in checks for problem in check(config, shape)]


def no_model(config: ModelConfig) -> str:
    """What to do where there is no config.json: the command, for what can be converted."""
    root = Path(config.model_path)
    wrong = f"no model at {root} (no config.json there)"
    if any(root.glob("consolidated*.pth")):
        return f"the model at {root} is in Meta's format; remedy: {_convert(config)}"
    if any(root.glob("*.safetensors")) or any(root.glob("pytorch_model*.bin")):
        return f"{wrong}; remedy: put the config.json there that belongs to the weights"
    named = "set handler.model_path (or modelPath) to" if config.source else "give"
    return f"{wrong}; remedy: {named} a local model directory in Hugging Face format"


def _convert(config: ModelConfig) -> str:
    """The remedy for a Llama in Meta's format: files for these ranks where the engine maps such."""
    root = Path(config.model_path)
    if config.engine not in ("native", "pipeline"):
        return layout.convert_first(root)
    sizes = {"--tp": config.tp_size, "--pp": config.pp_size}
    options = [word for name, size in sizes.items() if size > 1 for word in (name, str(size))]
    split = config.stage_split
    if config.pp_size > 1 and split != "work":
        options += ["--stage-split", split if isinstance(split, str) else ",".join(map(str, split))]
    return layout.convert_first(root, "--to", "sluice", *options)


def with_fallback(config: ModelConfig) -> ModelConfig:
    """As the engine that serves where kernel injection cannot, if that is allowed; a warning says why."""
    if config.engine != "deepspeed_inject":
        return config
    try:
        refusal = injection.why_autotp(config, _deepspeed_file(config))
    except modeldir.BadModelDir:
        return config  # which is said of the model
    if refusal is None:
        return config
    reason = str(refusal).removesuffix(f": {injection.AUTOTP}")
    why = _at(config, ("deepspeed.fallback",), f"AutoTP serves instead of {reason}")
    return config.model_copy(update={"engine": "deepspeed_tp", "warnings": (*config.warnings, why)})


def _deepspeed_file(config: ModelConfig) -> DeepSpeedFile:
    """A file that is missing or wrong has been reported: then, what injection needs."""
    try:
        return injection.settings_of(config)
    except ConfigError:
        return DeepSpeedFile(kernel_inject=True)


def _refusals(config: ModelConfig, shape: Shape) -> Iterator[str]:
    """What the engine would say of the model, and of the files that hold it."""
    for check in _REFUSALS.get(config.engine, ()):
        try:
            check(config)
        except UnsupportedModel as refusal:
            yield _at(config, _ENGINE_KEYS, str(refusal))
        except BadCheckpoint as damage:
            yield _at(config, MODEL_KEYS, str(damage))
        except (TypeError, AttributeError) as error:
            wrong = f"{config.model_path}/config.json: a value is not of its type: {error}"
            yield _at(config, _ENGINE_KEYS, f"{wrong}; remedy: fix config.json")


def _check_llama(config: ModelConfig) -> None:
    LlamaConfig.load(config.model_path)


def _check_stages(config: ModelConfig) -> None:
    """Whether a type that is not Llama can be cut into stages."""
    if is_llama(config.model_path):
        LlamaConfig.load(config.model_path)
        return
    kind = hf_support.read_config(config.model_path)["model_type"]
    if kind in hf_support.WITHOUT_PIPELINE_PLAN:
        raise hf_support.no_pipeline_plan(config.model_path, kind)


def _check_decoder(config: ModelConfig) -> None:
    hf_support.read_config(config.model_path)


def _check_autotp(config: ModelConfig) -> None:
    given = hf_support.read_config(config.model_path)
    stored = given.get("dtype", given.get("torch_dtype"))
    injection.check_dtype(str(stored) if config.dtype == "auto" else config.dtype, config.device)


def _check_injection(config: ModelConfig) -> None:
    injection.check_kernels(config, _deepspeed_file(config))


def _check_whole_files(config: ModelConfig) -> None:
    layout.check_whole(Path(config.model_path))


def _check_files(config: ModelConfig) -> None:
    """Files for ranks are for one division. They are of Llamas; all others are whole."""
    root = Path(config.model_path)
    if layout.layout_of(root) is None or not is_llama(root):
        layout.check_whole(root)
        return
    try:
        model = LlamaConfig.load(root)
    except UnsupportedModel:
        return  # which has been said
    if config.pp_size > model.num_layers or model.num_layers > _MAX_LAYERS:
        return  # the first is said below, the second is the engine's to say
    how = config.stage_split if config.engine == "pipeline" else "layers"
    try:
        stages = split_layers(sizes_of(model), config.pp_size, how)
    except BadSplit as bad:
        raise UnsupportedModel(str(bad)) from None
    is_cpu = config.device == "cpu"
    layout.check_files(root, stages, config.tp_size, is_cpu=is_cpu, reshard=config.reshard)


_REFUSALS: dict[str, tuple[Callable[[ModelConfig], None], ...]] = {
    "native": (_check_llama, _check_files),
    "pipeline": (_check_stages, _check_files),
    "accelerate": (_check_decoder, _check_whole_files),
    "deepspeed_tp": (_check_autotp, _check_whole_files),
    "deepspeed_inject": (_check_injection, _check_whole_files),
}


def _indivisible(config: ModelConfig, shape: Shape) -> Iterator[str]:
    find = _WHY_NOT.get(config.engine)
    why = find(shape, config.tp_size) if find else None
    if find is None or why is None:
        return
    most = min(shape.num_heads or config.tp_size, _MAX_RANKS)
    sizes = [size for size in range(1, most + 1) if find(shape, size) is None]
    name = "tensorParallel (or parallelLevel, nproc-per-node)" if config.source else "--tp"
    remedy = f"set {name} to one of: {_listed(sizes)}"
    yield _at(config, _TP_KEYS, f"{why} for {config.tp_size} ranks; remedy: {remedy}")


def _listed(sizes: list[int]) -> str:
    is_range = len(sizes) > _FEW and sizes[-1] - sizes[0] == len(sizes) - 1
    return f"{sizes[0]} to {sizes[-1]}" if is_range else ", ".join(map(str, sizes))


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
        yield _at(config, _PP_KEYS, f"{wrong}; remedy: set {name} to {shape.num_layers} or less")


def _too_long(config: ModelConfig, shape: Shape) -> Iterator[str]:
    longest = shape.max_positions
    if config.engine in _REFUSALS and longest and config.max_model_len and config.max_model_len > longest:
        name = "maxModelLen" if config.source else "--max-model-len"
        wrong = f"{name} is {config.max_model_len}, but the model was made for {longest} positions"
        wrong += f" (max_position_embeddings); remedy: set it to {longest} or less"
        yield _at(config, ("maxModelLen", "handler.max_seq_len"), wrong)


def _at(config: ModelConfig, keys: tuple[str, ...], problem: str) -> str:
    """Behind the line that gives the first of these keys, or the file; a model directory once."""
    place = config.place(*keys) or config.source
    if not place and problem.startswith(config.model_path):
        return problem
    return f"{place or config.model_path}: {problem}"
