"""model-config.yaml: TorchServe's keys by their own names, ours beside them, as one validated value.

`load` reads a file, `ModelConfig.for_directory` does without one. Both raise ConfigError with every
problem found, each with file, line, key and remedy. What a ModelConfig says is resolved: whoever holds
one checks nothing again. It crosses the process border as JSON (`model_dump_json`, `model_validate_json`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from engines.config_errors import ConfigError, Problem

__all__ = ["ConfigError", "DeepSpeedSection", "ModelConfig", "Problem", "load"]

ParallelType = Literal["tp", "pp", "pptp", "custom"]
Device = Literal["cpu", "cuda"]
StageSplit = Literal["work", "layers", "bytes"] | tuple[int, ...]
DType = Literal["auto", "float32", "bfloat16", "float16"]
Pooling = Literal["mean", "last"]
DeviceMap = str | tuple[tuple[str, str], ...]
MaxMemory = tuple[tuple[str, int], ...]


class DeepSpeedSection(BaseModel):
    """The `deepspeed:` section. Paths are absolute."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    config: str
    checkpoint: str | None = None
    fallback: str | None = None  # "autotp": the engine that serves where kernel injection cannot


class ModelConfig(BaseModel):
    """How one model is served, resolved. Durations are seconds, memory is bytes, paths are absolute."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model_name: str
    served_model_names: tuple[str, ...]
    model_path: str
    source: str = ""  # the YAML file; empty where the model directory was enough
    parallel_type: ParallelType = "tp"
    engine: str = "native"
    tp_size: int = 1
    pp_size: int = 1
    custom_devices: int = 1  # what the one process of `custom` sees
    device: Device = "cpu"
    device_ids: tuple[int, ...] | None = None  # as CUDA counts within CUDA_VISIBLE_DEVICES
    share_devices: bool = False
    num_replicas: int = 1
    omp_threads: int = 1  # per rank
    is_omp_stated: bool = True  # else placement divides the machine's cores over all models' ranks
    monitor_interval: float = 0.1  # how often torchrun looks at its ranks

    dtype: DType = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    max_prompt_slowdown: float | None = None  # of a step, by long prompts read in it; None: no limit
    kv_block_size: int = 16
    kv_cache_memory: int = 1 << 30  # per rank; CPU only
    gpu_memory_share: float = 0.9  # of each device's total
    prefix_cache: bool = True
    prompt_lookup: int = 0  # tokens guessed at once from what came before; 0: none
    pack_weights: bool = True  # bfloat16 in 12 bits, nothing lost
    int8_activations: bool = True  # what int8 weights are multiplied by in steps of many tokens
    deterministic: bool = False  # no token depends on what runs beside it, to the bit
    reshard: bool = False  # divide per-rank files of another layout anew at each start
    batch_size: int = 1  # static batching only
    max_batch_delay: float = 0.1  # static batching only
    pipeline_chunks: int | None = None  # micro-batches in flight; None: one for each stage
    stage_split: StageSplit = "work"  # how a pipeline's layers are divided, or how many each stage holds
    device_map: DeviceMap = "auto"  # engine accelerate: a policy, or (module, device) pairs
    max_memory: MaxMemory = ()  # engine accelerate: (device, bytes of weights) pairs

    job_queue_size: int = 100  # requests that may wait beyond max_num_seqs running ones; 0: none
    response_timeout: float = 120.0
    startup_timeout: float = 120.0
    max_retry_timeout: float = 300.0  # give up restarting a group this long after its first failure

    chat_template: str | None = None
    tool_format: str = "auto"  # how the model writes calls of tools; auto: as its chat template shows
    reasoning_format: str = "auto"  # which tags its thoughts are between
    pooling: Pooling | None = None  # how texts become the vectors of /v1/embeddings; None: not at all
    deepspeed: DeepSpeedSection | None = None
    warnings: tuple[str, ...] = ()  # keys that have no effect here and why, each with file:line
    places: tuple[tuple[str, str], ...] = ()  # (dotted key, file:line) of the keys that the file gives

    @property
    def world_size(self) -> int:
        """Processes of one group."""
        return self.tp_size * self.pp_size

    def place(self, *keys: str) -> str:
        """file:line of the first of these keys that the file gives; empty where it gives none."""
        places = dict(self.places)
        return next((places[key] for key in keys if key in places), "")

    @property
    def devices_per_group(self) -> int:
        """Devices that one group holds."""
        return self.custom_devices if self.parallel_type == "custom" else self.world_size

    @classmethod
    def for_directory(cls, path: Path | str, *, num_gpus: int | None = None, **flags: object) -> ModelConfig:
        """The configuration of `sluice serve MODEL_DIR`. Flags are the YAML keys, in snake_case or not
        (`dtype`, `max_model_len`), and `tp`, `pp` for the sizes; None means not given. A
        model-config.yaml in the directory is read first.

        Raises ConfigError."""
        from engines.config_resolve import resolve_directory

        return resolve_directory(Path(path), flags, num_gpus)


def load(
    path: Path | str, overrides: Mapping[str, object] | None = None, *, num_gpus: int | None = None
) -> ModelConfig:
    """Read a model-config.yaml. `overrides` are flags as in `ModelConfig.for_directory`; `num_gpus` is
    how many the machine has that it is for (None: look at this one).

    Raises ConfigError."""
    from engines.config_resolve import resolve_file

    return resolve_file(Path(path), overrides or {}, num_gpus)
