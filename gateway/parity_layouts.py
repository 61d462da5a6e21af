"""Which engines and layouts `sluice parity` compares on a machine. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from engines import registry
from engines.config import ModelConfig, ParallelType

MAX_CPU_RANKS = 4
_NAME = re.compile(r"(?P<engine>[A-Za-z0-9_.-]+?)(:(?P<sizes>(tp\d+)?(pp\d+)?))?")


class BadLayout(ValueError):  # noqa: N818
    """A name of --engines that cannot be understood. Says what may be written."""


@dataclass(frozen=True, slots=True)
class Layout:
    """An engine and its sizes."""

    engine: str
    tp: int = 1
    pp: int = 1

    def __str__(self) -> str:
        return f"{self.engine}:tp{self.tp}" + (f"pp{self.pp}" if self.pp > 1 else "")

    @property
    def num_ranks(self) -> int:
        return self.tp * self.pp

    @property
    def parallel_type(self) -> ParallelType:
        if self.engine == "accelerate":
            return "custom"
        return "tp" if self.pp == 1 else "pp" if self.tp == 1 else "pptp"

    def config_from(self, base: ModelConfig, num_cores: int) -> ModelConfig:
        """`base` served by this layout: one replica, the machine's cores divided over its ranks."""
        return base.model_copy(
            update={
                "model_name": f"{self.engine}-tp{self.tp}-pp{self.pp}",
                "engine": self.engine,
                "parallel_type": self.parallel_type,
                "tp_size": self.tp,
                "pp_size": self.pp,
                "custom_devices": 1,
                "device_ids": None,
                "num_replicas": 1,
                "stage_split": base.stage_split if base.pp_size == self.pp else "work",
                "deepspeed": base.deepspeed if base.world_size == self.num_ranks else None,
                "omp_threads": max(1, num_cores // self.num_ranks),
            }
        )

    def why_not_here(self, device: str, num_gpus: int) -> str:
        """Why this machine cannot hold it, or ""."""
        if device == "cuda" and self.num_ranks > num_gpus:
            return f"needs {self.num_ranks} GPUs, there are {num_gpus}"
        if device == "cpu" and self.num_ranks > MAX_CPU_RANKS:
            return f"{self.num_ranks} ranks on CPU; at most {MAX_CPU_RANKS} are started"
        return ""


def choose(names: Sequence[str]) -> list[Layout]:
    """The layouts of --engines (an engine, or engine:tpNppM); without names, those of every engine."""
    if not names:
        return [layout for engine in registry.names() for layout in _usual(engine)]
    return list(dict.fromkeys(layout for name in names for layout in _named(name)))


def _usual(engine: str) -> list[Layout]:
    sizes = registry.ENGINES[engine].parity if engine in registry.ENGINES else ((1, 1),)
    return [Layout(engine, tp, pp) for tp, pp in sizes]


def _named(name: str) -> list[Layout]:
    match = _NAME.fullmatch(name)
    if match is None:
        raise BadLayout(f"--engines: {name!r} is not ENGINE or ENGINE:tpN or ENGINE:ppN or ENGINE:tpNppN")
    try:
        registry.check(match["engine"])
    except registry.UnknownEngine as error:
        raise BadLayout(f"--engines: {error}") from None
    if not match["sizes"]:
        return _usual(match["engine"])
    sizes = {kind: int(size) for kind, size in re.findall(r"(tp|pp)(\d+)", match["sizes"])}
    if min(sizes.values()) < 1:
        raise BadLayout(f"--engines: {name!r}: sizes are 1 or more")
    return [Layout(match["engine"], sizes.get("tp", 1), sizes.get("pp", 1))]
