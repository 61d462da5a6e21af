"""Which devices each worker group gets: all replicas of all models together, before anything starts.

Pure. A device belongs to one group, unless its groups all say `shareDevices: true` and their stated
shares of its memory add to at most 1. Groups with deviceIds choose first; the others take the lowest
devices that are left, in the order of the models and their replicas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from engines.config import ModelConfig
from engines.config_devices import Machine


class DoesNotFit(ValueError):  # noqa: N818  it names the plan, not a failure
    """This machine cannot hold the groups. The message shows the sums and the remedy, one line a problem."""


@dataclass(frozen=True, slots=True)
class GroupPlacement:
    """One group: replica `replica` of model `config`, and its devices as CUDA_VISIBLE_DEVICES names them
    (none on CPU)."""

    config: ModelConfig
    replica: int
    devices: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.config.model_name}/{self.replica}"


@dataclass(frozen=True, slots=True)
class Placement:
    """Every group, in the order of the models and their replicas."""

    groups: tuple[GroupPlacement, ...]
    warnings: tuple[str, ...] = ()


def place(configs: Sequence[ModelConfig], machine: Machine) -> Placement:
    """Assign the machine's devices, and its cores to the ranks of CPU models whose file states no threads.

    Raises DoesNotFit."""
    configs = _divide_cores(configs, machine.num_cores)
    names = machine.visible or tuple(map(str, range(machine.num_gpus)))
    wanted = [(config, replica) for config in configs for replica in range(config.num_replicas)]
    on_gpus = [index for index, (config, _) in enumerate(wanted) if config.device == "cuda"]
    board = _Board(machine.num_gpus, sum(wanted[index][0].devices_per_group for index in on_gpus))
    placed: dict[int, tuple[str, ...]] = {}
    for index in sorted(on_gpus, key=lambda index: wanted[index][0].device_ids is None):
        config, replica = wanted[index]
        devices = board.take(config, f"{config.model_name}/{replica}")
        placed[index] = tuple(names[device] for device in devices)
    if board.problems:
        raise DoesNotFit("\n".join(board.problems))
    groups = tuple(GroupPlacement(*group, placed.get(index, ())) for index, group in enumerate(wanted))
    return Placement(groups, tuple(_warn_of_cores(configs, machine.num_cores)))


@dataclass(frozen=True, slots=True)
class _Holder:
    name: str
    share: Fraction
    shares: bool


class _Board:
    """Who holds which device so far."""

    def __init__(self, num_gpus: int, num_wanted: int) -> None:
        self.problems: list[str] = []
        self._num_wanted = num_wanted
        self._holders: list[list[_Holder]] = [[] for _ in range(num_gpus)]

    def take(self, config: ModelConfig, name: str) -> list[int]:
        """The devices of one group, now held by it. On failure lists why and returns none."""
        holder = _Holder(name, Fraction(str(config.gpu_memory_share)), config.share_devices)
        pool = list(range(len(self._holders)) if config.device_ids is None else config.device_ids)
        beyond = [device for device in pool if device >= len(self._holders)]
        if beyond:
            remedy = _remedy(config, False) if not self._holders else "name devices that there are"
            wrong = f"{name}: deviceIds names {beyond}, but {self._machine()}"
            return self._refuse(config, f"{wrong}; remedy: {remedy}")
        free = [device for device in pool if self._fits(device, holder)]
        if len(free) < config.devices_per_group:
            return self._refuse(config, self._shortage(config, holder, pool, len(free)))
        # A stable sort: empty devices in order, then the least shared ones.
        chosen = sorted(sorted(free, key=self._load)[: config.devices_per_group], key=pool.index)
        for device in chosen:
            self._holders[device].append(holder)
        return chosen

    def _fits(self, device: int, holder: _Holder) -> bool:
        held = self._holders[device]
        sharing = holder.shares and all(other.shares for other in held)
        return not held or (sharing and self._load(device) + holder.share <= 1)

    def _load(self, device: int) -> Fraction:
        return sum((other.share for other in self._holders[device]), Fraction())

    def _refuse(self, config: ModelConfig, problem: str) -> list[int]:
        place = config.place("deviceIds", "parallelLevel", "torchrun.nproc-per-node", "deviceType")
        self.problems.append(f"{place}: {problem}" if place else problem)
        return []

    def _machine(self) -> str:
        count = len(self._holders)
        return f"the machine has {count} GPU{'' if count == 1 else 's'} ({_range(count)})"

    def _shortage(self, config: ModelConfig, holder: _Holder, pool: list[int], num_free: int) -> str:
        needed = config.devices_per_group
        place = self._machine() if config.device_ids is None else f"deviceIds is {pool}"
        taken = "; ".join(f"{device}: {self._held(device)}" for device in pool if self._holders[device])
        sums = (
            f"{holder.name}: needs {needed} GPU{'' if needed == 1 else 's'}, "
            f"{num_free} {'is' if num_free == 1 else 'are'} free for it; {place}; "
            f"all groups together need {self._num_wanted}"
        )
        held = f"; held: {taken}" if taken else ""
        return f"{sums}{held}; remedy: {_remedy(config, bool(self._holders))}"

    def _held(self, device: int) -> str:
        held = [f"{h.name} ({float(h.share):g})" if h.shares else h.name for h in self._holders[device]]
        return " + ".join(held)


def _remedy(config: ModelConfig, has_gpus: bool) -> str:
    """In the words of the command line where there is no file."""
    if not has_gpus:
        on_cpu = "write deviceType: cpu (or give --device cpu)" if config.source else "give --device cpu"
        return f"{on_cpu}, or plan for another machine with `sluice check --gpus N`"
    if config.share_devices:
        return "lower gpuMemoryShare so that the shares on a device add to at most 1"
    if not config.source:
        return "lower --replicas, --tp or --pp"
    return (
        "lower minWorkers or parallelLevel, name other deviceIds, "
        "or let groups share: shareDevices: true with gpuMemoryShare"
    )


def _range(count: int) -> str:
    return "none" if count == 0 else "0" if count == 1 else f"0 to {count - 1}"


def _divide_cores(configs: Sequence[ModelConfig], num_cores: int) -> list[ModelConfig]:
    """Threads for the ranks on CPU that state none: an equal part of the cores that the others leave."""
    on_cpu = [config for config in configs if config.device == "cpu"]
    stated = sum(_num_ranks(c) * c.omp_threads for c in on_cpu if c.is_omp_stated)
    num_open = sum(_num_ranks(c) for c in on_cpu if not c.is_omp_stated)
    threads = max(1, (num_cores - stated) // num_open) if num_open else 1
    return [
        c if c.device != "cpu" or c.is_omp_stated else c.model_copy(update={"omp_threads": threads})
        for c in configs
    ]


def _num_ranks(config: ModelConfig) -> int:
    return config.num_replicas * config.world_size


def _warn_of_cores(configs: Sequence[ModelConfig], num_cores: int) -> list[str]:
    threads = sum(_num_ranks(c) * c.omp_threads for c in configs if c.device == "cpu")
    if threads <= num_cores:
        return []
    sums = " + ".join(
        f"{c.model_name}: {c.num_replicas} x {c.world_size} ranks x {c.omp_threads} threads"
        for c in configs
        if c.device == "cpu"
    )
    fewer = "" if all(c.omp_threads == 1 for c in configs) else "torchrun.OMP_NUMBER_THREADS, "
    return [
        f"{threads} threads on {num_cores} cores ({sums}): they will slow each other down; "
        f"lower {fewer}minWorkers or the ranks"
    ]
