"""How `sluice check` shows a configuration: by the YAML's own names, what applies to it, sizes for people."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

from engines import registry
from engines.config import DeviceMap, ModelConfig
from engines.config_devices import Machine
from gateway.workers import launcher
from gateway.workers.placement import GroupPlacement, Placement

_RUN_DIR, _LOG_DIR = Path("RUN_DIR"), Path("LOG_DIR")  # made anew for each start
_UNITS = (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10))

Field = tuple[str, object]


def describe(config: ModelConfig) -> Iterator[str]:
    """A heading, a line for each key, and what has no effect."""
    yield config.source or config.model_path
    for name, value in _fields(config):
        yield f"  {name:<28} {_show(value)}"
    for warning in config.warnings:
        yield f"  warning: {warning}"
    yield ""


def describe_placement(placement: Placement, machine: Machine) -> Iterator[str]:
    """Which devices each group gets, and its command."""
    yield f"devices ({_count(machine.num_gpus, 'GPU')}, {_count(machine.num_cores, 'core')})"
    for group in placement.groups:
        devices = ", ".join(group.devices) if group.devices else "CPU"
        yield f"  {group.name:<28} {devices}"
    for warning in placement.warnings:
        yield f"  warning: {warning}"
    yield ""
    yield "commands (under python -m engines.guard; RUN_DIR and LOG_DIR are new for each start)"
    for group in placement.groups:
        yield f"  {group.name}"
        yield from (f"    {line}" for line in _command(group))


def size(num_bytes: int) -> str:
    """Bytes in the largest unit of which there is one, to four digits."""
    for unit, shift in _UNITS:
        if num_bytes >= 1 << shift:
            return f"{num_bytes / (1 << shift):.4g} {unit}"
    return f"{num_bytes} bytes"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _fields(config: ModelConfig) -> Iterator[Field]:
    yield "modelName", config.model_name
    yield "servedModelNames", config.served_model_names
    yield "modelPath", config.model_path
    yield "chatTemplate", config.chat_template
    yield "toolFormat", config.tool_format
    yield "reasoningFormat", config.reasoning_format
    yield "pooling", config.pooling
    yield "engine", config.engine
    yield from _parallel_fields(config)
    yield from _device_fields(config)
    yield "dtype", config.dtype
    yield "maxModelLen", config.max_model_len
    yield from _batching_fields(config)
    yield from _engine_fields(config)
    yield "jobQueueSize", config.job_queue_size
    yield "responseTimeout", f"{config.response_timeout:g} s"
    yield "startupTimeout", f"{config.startup_timeout:g} s"
    yield "maxRetryTimeoutInSec", f"{config.max_retry_timeout:g} s"


def _parallel_fields(config: ModelConfig) -> Iterator[Field]:
    yield "minWorkers", config.num_replicas
    yield "parallelType", config.parallel_type
    if config.parallel_type in ("tp", "pptp"):
        yield "tensorParallel", config.tp_size
    if config.parallel_type in ("pp", "pptp"):
        yield "pipelineParallel", config.pp_size
    if config.parallel_type == "custom":
        yield "parallelLevel", config.custom_devices
    else:
        yield "torchrun.monitor-interval", f"{config.monitor_interval:g} s"


def _device_fields(config: ModelConfig) -> Iterator[Field]:
    yield "torchrun.OMP_NUMBER_THREADS", config.omp_threads
    if config.device == "cpu":
        yield "deviceType", "cpu"
        if not registry.is_static(config.engine):
            yield "kvCacheMemory", f"{size(config.kv_cache_memory)} per rank"
        return
    yield "deviceType", "gpu"
    yield "deviceIds", config.device_ids
    yield "shareDevices", config.share_devices
    yield "gpuMemoryShare", f"{config.gpu_memory_share:g}"


def _batching_fields(config: ModelConfig) -> Iterator[Field]:
    if registry.is_static(config.engine):
        yield "batchSize", config.batch_size
        yield "maxBatchDelay", f"{1000 * config.max_batch_delay:g} ms"
        return
    yield "maxNumSeqs", config.max_num_seqs
    yield "maxNumBatchedTokens", config.max_num_batched_tokens
    if config.engine != "pipeline":
        yield "maxPromptSlowdown", config.max_prompt_slowdown and f"{config.max_prompt_slowdown:g}"
    yield "promptLookup", config.prompt_lookup
    yield "kvBlockSize", config.kv_block_size
    yield "prefixCache", config.prefix_cache


def _engine_fields(config: ModelConfig) -> Iterator[Field]:
    if config.engine == "pipeline":
        yield "stageSplit", config.stage_split
        yield "pippy.chunks", config.pipeline_chunks or config.pp_size
    if config.engine == "accelerate":
        yield "deviceMap", _device_map(config.device_map)
        yield "maxMemory", tuple(f"{device}: {size(most)}" for device, most in config.max_memory)
    if config.engine in ("native", "pipeline"):
        yield "reshard", config.reshard
    if config.deepspeed is not None:
        yield "deepspeed.config", config.deepspeed.config
        yield "deepspeed.fallback", config.deepspeed.fallback


def _device_map(device_map: DeviceMap) -> object:
    if isinstance(device_map, str):
        return device_map
    return tuple(f"{module or 'all'}: {device}" for module, device in device_map)


def _show(value: object) -> str:
    match value:
        case None | ():
            return "-"
        case bool():
            return str(value).lower()
        case tuple():
            return ", ".join(map(str, value))
    return str(value)


def _command(group: GroupPlacement) -> Iterator[str]:
    """As one would type it, what the environment adds in front, a line each."""
    for name, value in launcher.environment(group.config, group.devices, {}).items():
        yield f"{name}={shlex.quote(value)} \\"
    yield shlex.join(launcher.torchrun_argv(group.config, _RUN_DIR, _LOG_DIR))
