"""How the ranks of a group divide: parallelType, its sizes, and which of them contradict each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from engines.config import Device, ParallelType
from engines.config_read import Settings

_LEVEL, _NPROC = "parallelLevel", "torchrun.nproc-per-node"


@dataclass(frozen=True, slots=True)
class Split:
    """Sizes of one group. `custom_devices`: what the one process of `custom` sees."""

    parallel_type: ParallelType
    tp_size: int = 1
    pp_size: int = 1
    custom_devices: int = 1

    @property
    def num_devices(self) -> int:
        return self.custom_devices if self.parallel_type == "custom" else self.tp_size * self.pp_size


def read_split(s: Settings, device: Device, gpus: int, replicas: int) -> Split:
    """How the ranks of a group divide, from parallelType and the sizes."""
    kind = cast("ParallelType | None", s.text("parallelType"))
    if s.has(_LEVEL) and s.has(_NPROC) and s.integer(_LEVEL) != s.integer(_NPROC):
        remedy = f"keep {_NPROC} and remove {_LEVEL}, or the other way round"
        s.problem(_LEVEL, f"is not {_NPROC} ({s.where(_NPROC)}): both are the size", remedy=remedy)
        return Split(kind or "tp")
    level = s.integer(_LEVEL) or s.integer(_NPROC)
    if kind is None:
        _check_sizes_need_type(s)
        return Split("tp")
    if kind == "custom":
        ids = s.integers("deviceIds") or ()
        every = len(ids) if ids else gpus if device == "cuda" else 1
        if (s.integer(_NPROC) or 1) > 1:
            meant = f"one process with {level} devices, not {level} processes"
            s.warn(_NPROC, f"is {level}, which for parallelType custom means {meant}; write {_LEVEL} instead")
        return Split(kind, custom_devices=level or max(1, every // replicas))
    tp, pp = s.integer("tensorParallel"), s.integer("pipelineParallel")
    if level is None and s.has("torchrun") and not s.has(_NPROC):
        level = None if tp or pp else 1  # what torchrun itself starts
    if kind == "pptp":
        return _split_both(s, level, tp, pp)
    return _split_one(s, kind, level, tp, pp)


def _check_sizes_need_type(s: Settings) -> None:
    if s.has("parallelType"):
        return  # wrong, and said so already
    for key in (_LEVEL, _NPROC, "tensorParallel", "pipelineParallel"):
        if s.has(key):
            remedy = "add parallelType: tp (or pp, pptp, custom)"
            s.problem(
                key, "has no meaning without parallelType", allowed="pp, tp, pptp, custom", remedy=remedy
            )


def _split_one(s: Settings, kind: ParallelType, level: int | None, tp: int | None, pp: int | None) -> Split:
    mine, other = (
        ("tensorParallel", "pipelineParallel") if kind == "tp" else ("pipelineParallel", "tensorParallel")
    )
    size, stray = (tp, pp) if kind == "tp" else (pp, tp)
    if stray and stray != 1:
        s.problem(other, f"is {stray}, but parallelType is {kind}", remedy="write parallelType: pptp")
    if size and level and size != level:
        key = _LEVEL if s.has(_LEVEL) else _NPROC
        wrong = f"is {size}, but {key} ({s.where(key)}) is {level}: both are the size"
        s.problem(mine, wrong, remedy="remove one of them")
    size = size or level
    if size is None:
        if not any(map(s.has, (_LEVEL, _NPROC, mine))):
            remedy = f"add {_LEVEL}: 2 (or another number of devices)"
            s.problem("parallelType", f"is {kind}, but no size says over how many devices", remedy=remedy)
        size = 1
    return Split(kind, tp_size=size) if kind == "tp" else Split(kind, pp_size=size)


def _split_both(s: Settings, level: int | None, tp: int | None, pp: int | None) -> Split:
    if level and (tp or pp):
        tp, pp = tp or level // (pp or 1), pp or level // (tp or 1)
    if not tp or not pp:
        if not any(map(s.has, ("tensorParallel", "pipelineParallel"))) or not level:
            ranks = f"{level} ranks" if level else "the ranks"
            remedy = "add tensorParallel: and pipelineParallel: with that product"
            s.problem(
                "parallelType", f"is pptp, but nothing says how {ranks} divide into both", remedy=remedy
            )
        elif s.integer("tensorParallel") or s.integer("pipelineParallel"):
            s.problem(
                "parallelType", f"is pptp, but a size exceeds the {level} ranks", remedy="correct the sizes"
            )
        return Split("pptp")
    if level and tp * pp != level:
        sums = f"tensorParallel {tp} x pipelineParallel {pp} = {tp * pp}, but the group has {level} ranks"
        key = "tensorParallel" if s.has("tensorParallel") else "parallelType"
        s.problem(key, sums, remedy=f"make the product {level}")
    return Split("pptp", tp_size=tp, pp_size=pp)
