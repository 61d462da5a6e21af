"""What `sluice serve` can be told: of every model, and of the server."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from engines.config_schema import DEVICES, DTYPES, POOLINGS, REASONING_FORMATS, TOOL_FORMATS
from gateway.flags import flag
from gateway.logs import LogFormat
from gateway.settings import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFlags:
    """What the command line may say of every model that it serves. None: what its file says, or the model."""

    tp: int | None = flag(None, "Ranks that share each layer.", low=1)
    pp: int | None = flag(None, "Stages that the layers are split into.", low=1)
    replicas: int | None = flag(None, "Worker groups per model.", low=1)
    dtype: str | None = flag(
        None, "Of the weights; auto: as they are stored.", choices=dict.fromkeys(DTYPES.values())
    )
    device: str | None = flag(None, "Where the ranks compute.", choices=dict.fromkeys(DEVICES.values()))
    max_model_len: int | None = flag(None, "Tokens of prompt and answer together.", low=1)
    max_num_seqs: int | None = flag(None, "Sequences that run at once.", low=1)
    kv_cache_memory: str | None = flag(None, 'K/V memory of each rank on CPU, such as "2GiB".')
    gpu_memory_share: float | None = flag(None, "Of each device's total.", low=0, high=1)
    omp_threads: int | None = flag(None, "CPU threads of each rank.", low=1)
    served_names: tuple[str, ...] = flag(
        (), "What clients call the model; may be repeated.", name="served_name"
    )
    tool_format: str | None = flag(
        None, "How the model writes calls of tools; auto: as its chat template shows.", choices=TOOL_FORMATS
    )
    reasoning_format: str | None = flag(
        None,
        "The tags of the model's thoughts; auto: those of its chat template.",
        choices=REASONING_FORMATS,
    )
    pooling: str | None = flag(
        None, "Serve embeddings, too: of all tokens the mean, or the last one's.", choices=POOLINGS
    )

    def as_config(self) -> dict[str, object]:
        """By the names that `resolve` takes."""
        flags = asdict(self)
        for name, known in _NAMES.items():
            flags[known] = flags.pop(name)
        return {**flags, "served_model_names": list(self.served_names) or None}


_NAMES = {
    "replicas": "min_workers",
    "device": "device_type",
    "omp_threads": "torchrun.OMP_NUMBER_THREADS",
    "served_names": "served_model_names",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options(Settings):
    """What is not about a model."""

    host: str = flag("127.0.0.1", "Address to listen on.")
    port: int = flag(8000, "0: any free one.", low=0, high=65535)
    grace: float = flag(30.0, "Seconds that running requests get at SIGTERM.", low=0)
    recovery_wait: float = flag(
        60.0, "Seconds that a stream waits to go on when its workers have died.", low=0
    )
    log_level: Literal["debug", "info", "warning", "error"] = flag("info", "What is logged, at least.")
    log_format: LogFormat = flag("text", "json: an object a line.")
    log_dir: Path | None = flag(
        None,
        "Where the ranks' logs and the socket of `sluice admin` go; without, ~/.local/state/sluice/PORT.",
    )
    replace: bool = flag(
        False,
        "Once ready, take the port over from the sluice that listens there, which ends what it has.",
    )
