"""From checked settings to a ModelConfig: what the keys mean together, and which contradict each other."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from engines import config_devices, registry
from engines.config import DeepSpeedSection, Device, DType, ModelConfig, ParallelType, Pooling, StageSplit
from engines.config_accelerate import read_device_map, read_max_memory
from engines.config_deepspeed import DeepSpeedFile, read_deepspeed_file
from engines.config_errors import nearest
from engines.config_overrides import COMMAND_LINE, apply_flags
from engines.config_read import Settings, read_settings, warning_line
from engines.config_source import Section, read_yaml
from engines.config_split import Split, read_split

CONFIG_NAME = "model-config.yaml"
_OTHER_DEEPSPEED = {True: "deepspeed_tp", False: "deepspeed_inject"}  # that kernel_inject speaks against


def resolve_file(path: Path, flags: Mapping[str, object], num_gpus: int | None) -> ModelConfig:
    """The configuration that a file and flags over it give. Raises ConfigError."""
    tree, problems = read_yaml(path)
    apply_flags(tree, flags)
    settings = read_settings(tree, problems, str(path))
    return _resolve(settings, Path(os.path.abspath(path)).parent, str(path), num_gpus)


def resolve_directory(path: Path, flags: Mapping[str, object], num_gpus: int | None) -> ModelConfig:
    """The configuration of a model directory without a file of its own. Raises ConfigError."""
    if (path / CONFIG_NAME).is_file():
        return resolve_file(path / CONFIG_NAME, flags, num_gpus)
    tree = Section(COMMAND_LINE)
    apply_flags(tree, flags)
    settings = read_settings(tree, [], COMMAND_LINE)
    return _resolve(settings, Path(os.path.abspath(path)), "", num_gpus)


def _resolve(s: Settings, base: Path, source: str, num_gpus: int | None) -> ModelConfig:
    gpus = config_devices.num_gpus() if num_gpus is None else num_gpus
    replicas = _replicas(s)
    device = _device(s, gpus)
    split = read_split(s, device, gpus, replicas)
    world = split.tp_size * split.pp_size
    deepspeed, deepspeed_file = _deepspeed(s, base, world)
    engine = _engine(s, split.parallel_type, deepspeed_file)
    deepspeed_dtype = deepspeed_file.dtype if deepspeed_file and engine.startswith("deepspeed") else None
    _check_device_ids(s, split, replicas)
    _check_stage_split(s, split)
    _check_deterministic(s, engine, device)
    _warn_without_effect(s, device, engine, split.parallel_type)
    _warn_of_idle_stages(s, engine, split.pp_size)
    _warn_of_small_blocks(s, device)
    name = s.text("modelName") or _clean_name(base.name)
    template = _first(s, "chatTemplate", "handler.chat_template")
    queue = 0 if s.flag("useJobTicket") else (s.integer("jobQueueSize") or 100)
    config = ModelConfig(
        source=source,
        model_name=name,
        served_model_names=s.texts("servedModelNames") or (name,),
        model_path=_path(base, cast("str | None", _first(s, "modelPath", "handler.model_path")) or "."),
        parallel_type=split.parallel_type,
        engine=engine,
        tp_size=split.tp_size,
        pp_size=split.pp_size,
        custom_devices=split.custom_devices,
        device=device,
        device_ids=s.integers("deviceIds"),
        share_devices=s.flag("shareDevices"),
        num_replicas=replicas,
        omp_threads=s.integer("torchrun.OMP_NUMBER_THREADS") or _cores_each(world * replicas),
        is_omp_stated="torchrun.OMP_NUMBER_THREADS" in s.values,
        monitor_interval=_or(s.number("torchrun.monitor-interval"), 0.1),
        dtype=cast(DType, s.text("dtype") or deepspeed_dtype or "auto"),
        max_model_len=cast("int | None", _first(s, "maxModelLen", "handler.max_seq_len")),
        max_num_seqs=cast("int | None", _first(s, "maxNumSeqs", "handler.max_batch_size")) or 256,
        max_num_batched_tokens=s.integer("maxNumBatchedTokens") or _batched_tokens(s, engine, split, device),
        max_prompt_slowdown=s.number("maxPromptSlowdown") or (None if device == "cuda" else 2.0),
        kv_block_size=s.integer("kvBlockSize") or (256 if device == "cuda" else 16),
        kv_cache_memory=s.integer("kvCacheMemory") or 1 << 30,
        gpu_memory_share=_or(s.number("gpuMemoryShare"), 0.9),
        prefix_cache=s.flag("prefixCache", default=True),
        prompt_lookup=s.integer("promptLookup") or 0,
        deterministic=s.flag("deterministic"),
        pack_weights=s.flag("packWeights", default=True),
        int8_activations=s.flag("int8Activations", default=True),
        reshard=s.flag("reshard"),
        batch_size=s.integer("batchSize") or 1,
        max_batch_delay=_or(s.integer("maxBatchDelay"), 100) / 1000,
        pipeline_chunks=s.integer("pippy.chunks"),
        stage_split=cast(StageSplit, s.values.get("stageSplit", "work")),
        device_map=read_device_map(s, _key(s, "deviceMap", "handler.device_map")),
        max_memory=read_max_memory(s, _key(s, "maxMemory", "handler.max_memory")),
        job_queue_size=queue,
        response_timeout=_or(s.number("responseTimeout"), 120.0),
        startup_timeout=_or(s.number("startupTimeout"), 120.0),
        max_retry_timeout=_or(s.integer("maxRetryTimeoutInSec"), 300),
        chat_template=_path(base, cast(str, template)) if template else None,
        tool_format=s.text("toolFormat") or "auto",
        reasoning_format=s.text("reasoningFormat") or "auto",
        pooling=cast("Pooling | None", s.text("pooling")),
        deepspeed=deepspeed,
        warnings=tuple(sorted(s.warnings, key=warning_line)),
        places=tuple((key, where) for key, where in s.places.items() if where != COMMAND_LINE),
    )
    s.check()
    return config


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _first(s: Settings, *keys: str) -> object:
    """The value of the first key that has one."""
    return s.values.get(_key(s, *keys))


def _key(s: Settings, *keys: str) -> str:
    """The first key that has a value; the others that have one are listed as without effect."""
    given = [key for key in keys if key in s.values]
    for key in given[1:]:
        s.warn(key, f"has no effect: {given[0]} says the same and comes first")
    return given[0] if given else keys[0]


def _path(base: Path, text: str) -> str:
    return os.path.abspath(base / text)


def _clean_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_\-.]", "-", text).lstrip("-_.") or "model"


def _cores_each(num_ranks: int) -> int:
    return max(1, config_devices.num_cores() // num_ranks)


def _replicas(s: Settings) -> int:
    low, high = s.integer("minWorkers"), s.integer("maxWorkers")
    if low and high and high < low:
        s.problem(
            "maxWorkers", f"is {high}, less than minWorkers {low}", remedy="set both to the replicas wanted"
        )
    elif high and high > (low or 1):
        s.warn("maxWorkers", f"has no effect: {low or 1} replicas (minWorkers) are started, none added later")
    return low or 1


def _device(s: Settings, gpus: int) -> Device:
    kind = s.text("deviceType")
    if kind == "cpu" and s.has("deviceIds"):
        remedy = "remove deviceIds, or write deviceType: gpu"
        s.problem("deviceIds", "names GPUs, but deviceType is cpu", remedy=remedy)
    if kind:
        return cast(Device, kind)
    return "cuda" if gpus or s.has("deviceIds") else "cpu"


def _deepspeed(s: Settings, base: Path, world: int) -> tuple[DeepSpeedSection | None, DeepSpeedFile | None]:
    if not s.has("deepspeed"):
        return None, None
    name = s.text("deepspeed.config")
    if name is None:
        if not s.has("deepspeed.config"):
            remedy = "add config: ds-config.json under deepspeed:"
            s.problem("deepspeed", "needs the key config, a DeepSpeed JSON file", remedy=remedy)
        return None, None
    path, checkpoint = _path(base, name), s.text("deepspeed.checkpoint")
    section = DeepSpeedSection(
        config=path,
        checkpoint=_path(base, checkpoint) if checkpoint else None,
        fallback=s.text("deepspeed.fallback"),
    )
    if checkpoint:
        why = "weights are read from the model's safetensors, on each rank its own; no list of .bin files"
        s.warn("deepspeed.checkpoint", f"has no effect: {why} is made")
    return section, read_deepspeed_file(s, Path(path), world, s.text("dtype"))


def _engine(s: Settings, kind: ParallelType, deepspeed: DeepSpeedFile | None) -> str:
    chosen = s.text("engine")
    if chosen is None:
        return _default_engine(kind, deepspeed is not None or s.has("deepspeed"), deepspeed)
    known = registry.names()
    if chosen not in known:
        near = nearest(chosen, known)
        remedy = (
            f"write `engine: {near}`"
            if near
            else f"name one of them, or install its plug-in ({registry.GROUP})"
        )
        s.problem("engine", f"is {chosen!r}, unknown", allowed=", ".join(known), near=near, remedy=remedy)
    splits = registry.ENGINES[chosen].parallel_types if chosen in registry.ENGINES else ()
    if splits and kind not in splits:
        remedy = f"write parallelType: {splits[0]}, or remove engine"
        s.problem(
            "engine", f"{chosen} cannot do parallelType {kind}", allowed=", ".join(splits), remedy=remedy
        )
    if deepspeed is not None and chosen == _OTHER_DEEPSPEED[deepspeed.kernel_inject]:
        told = f"replace_with_kernel_inject: {str(deepspeed.kernel_inject).lower()}"
        s.problem("engine", f"is {chosen}, but the DeepSpeed file says {told}", remedy="remove engine")
    return chosen


def _default_engine(kind: ParallelType, has_deepspeed: bool, deepspeed: DeepSpeedFile | None) -> str:
    if kind == "custom":
        return "accelerate"
    if kind != "tp":
        return "pipeline"
    if not has_deepspeed:
        return "native"
    return "deepspeed_inject" if deepspeed and deepspeed.kernel_inject else "deepspeed_tp"


def _check_device_ids(s: Settings, split: Split, replicas: int) -> None:
    ids = s.integers("deviceIds")
    size = split.num_devices
    if ids is None:
        return
    needed = size if s.flag("shareDevices") else size * replicas
    if len(ids) >= needed:
        return
    sums = f"{replicas} workers x {size} devices = {size * replicas}, but deviceIds names {len(ids)}"
    s.problem("deviceIds", sums, remedy="name more devices, or lower minWorkers or the devices of a worker")


def _batched_tokens(s: Settings, engine: str, split: Split, device: Device) -> int:
    """The default. In a pipeline a long step of one micro-batch leaves all other stages without work, so
    prompts come in smaller pieces there; yet one step holds a token of each sequence of a micro-batch."""
    if engine != "pipeline":
        return 2048
    max_num_seqs = s.integer("maxNumSeqs") or s.integer("handler.max_batch_size") or 256
    return max(256 if device == "cpu" else 512, 128 + -(-max_num_seqs // split.pp_size))


def _check_stage_split(s: Settings, split: Split) -> None:
    counts = s.values.get("stageSplit")
    if isinstance(counts, tuple) and split.parallel_type in ("pp", "pptp") and len(counts) != split.pp_size:
        s.problem(
            "stageSplit",
            f"names the layers of {len(counts)} stages, but the group has {split.pp_size}",
            remedy=f"give {split.pp_size} numbers, or remove the key",
        )


def _check_deterministic(s: Settings, engine: str, device: Device) -> None:
    if s.flag("deterministic") and not _has_kernels(engine, device):
        remedy = "remove it, or serve a Llama with engine native or pipeline and deviceType: cpu"
        s.problem("deterministic", f"is true, but {_no_kernels(engine, device)}", remedy=remedy)


def _has_kernels(engine: str, device: Device) -> bool:
    return device == "cpu" and engine in ("native", "pipeline")


def _no_kernels(engine: str, device: Device) -> str:
    return f"engine {engine} on {'a CPU' if device == 'cpu' else 'GPUs'} has no such kernels"


def _warn_of_small_blocks(s: Settings, device: Device) -> None:
    size = s.integer("kvBlockSize")
    if device == "cuda" and size is not None and size % 256:
        why = "FlashAttention's paged kernel is not used, and a slower one is"
        s.warn("kvBlockSize", f"is {size}, no multiple of 256, so {why}: remove it, or set it to 256")


def _warn_of_idle_stages(s: Settings, engine: str, num_stages: int) -> None:
    chunks = s.integer("pippy.chunks")
    if engine == "pipeline" and chunks is not None and chunks < num_stages:
        idle = f"{num_stages - chunks} of {num_stages} stages have no work at any time"
        s.warn("pippy.chunks", f"is {chunks}, so {idle}: remove it, or set it to {num_stages}")


def _warn_without_effect(s: Settings, device: Device, engine: str, kind: ParallelType) -> None:
    """List what was given and does not act with this device, engine or parallelType."""
    if s.flag("shareDevices") and not s.has("gpuMemoryShare"):
        remedy = "add gpuMemoryShare, such that the shares on a device add to at most 1.0"
        s.problem("shareDevices", "needs a stated gpuMemoryShare", remedy=remedy)
    reasons = {"parallel": f"parallelType is {kind}", "engine": f"engine {engine} batches continuously"}
    idle: list[tuple[str, str]] = []
    is_ours = engine in registry.ENGINES  # what others read is theirs to say
    if device == "cpu":
        idle += [("gpuMemoryShare", "deviceType is cpu; kvCacheMemory is the budget there")]
        idle += [("shareDevices", "deviceType is cpu")]
    else:
        idle += [("kvCacheMemory", "deviceType is gpu; gpuMemoryShare is the budget there")]
    if is_ours and registry.is_static(engine):
        idle += [("promptLookup", f"engine {engine} computes one token of each row at a time")]
        idle += [("maxPromptSlowdown", f"engine {engine} reads all prompts of a batch at once")]
    if is_ours and not registry.is_static(engine):
        idle += [("batchSize", reasons["engine"] + "; maxNumSeqs is the limit")]
        idle += [("maxBatchDelay", reasons["engine"] + " and never waits for a batch to fill")]
    if is_ours and not engine.startswith("deepspeed"):
        idle += [("deepspeed", f"engine is {engine}")]
    if engine == "deepspeed_tp":
        idle += [("deepspeed.fallback", "engine deepspeed_tp is AutoTP already; kernel injection falls back")]
    if engine == "pipeline":
        idle += [("maxPromptSlowdown", "a pipeline reads prompts in pieces of a micro-batch's size")]
    if is_ours and engine != "pipeline":
        idle += [("pippy", f"engine is {engine}"), ("stageSplit", f"engine is {engine}")]
    if is_ours and engine != "accelerate":
        placing = ("deviceMap", "maxMemory", "handler.device_map", "handler.max_memory")
        idle += [(key, f"engine is {engine}; accelerate places modules") for key in placing]
    elif isinstance(_first(s, "deviceMap", "handler.device_map"), Section):
        why = "deviceMap says where each module goes"
        idle += [("maxMemory", why), ("handler.max_memory", why)]
    if is_ours and not _has_kernels(engine, device):
        idle += [(key, _no_kernels(engine, device)) for key in ("int8Activations", "packWeights")]
    elif s.flag("deterministic"):
        idle += [("int8Activations", "with deterministic: true rows keep their 16 bits")]
    if kind == "custom":
        idle += [("torchrun.monitor-interval", "custom is one process, without torchrun")]
        idle += [("tensorParallel", reasons["parallel"]), ("pipelineParallel", reasons["parallel"])]
    if s.flag("useJobTicket"):
        idle += [("jobQueueSize", "with useJobTicket a request is taken at once or refused")]
    for key, reason in idle:
        if s.has(key):
            s.warn(key, f"has no effect: {reason}")
