"""Where this rank stands among the ranks of its group, and how it talks to its neighbours.

Rank 0 is tensor-parallel rank 0 of the last stage: the leader, the histories and the sampler are one
process, and logits travel only inside one tensor-parallel group. So stage = pp_size - 1 - rank // tp_size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from engines.runtime.shared_memory import SharedGroup
from engines.runtime.shared_pipe import SharedPipe
from engines.runtime.stage_clock import StageClock


@dataclass(frozen=True)
class Mesh:
    """A grid of pp_size stages by tp_size ranks, tp inner. Groups are None where they would be of one;
    `shared` is what the tensor-parallel ranks of a CPU use instead of their group, `from_previous` and
    `to_next` what its stages do."""

    rank: int
    tp_size: int
    pp_size: int
    device: torch.device
    tp_group: dist.ProcessGroup | None = None
    clock: StageClock = field(default_factory=StageClock)
    shared: SharedGroup | None = None
    from_previous: SharedPipe | None = None
    to_next: SharedPipe | None = None

    @property
    def world_size(self) -> int:
        return self.tp_size * self.pp_size

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp_size

    @property
    def stage(self) -> int:
        return self.pp_size - 1 - self.rank // self.tp_size

    @property
    def is_first_stage(self) -> bool:
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        return self.stage == self.pp_size - 1

    @property
    def is_leader(self) -> bool:
        return self.rank == 0

    @property
    def next_rank(self) -> int:
        """The same tensor-parallel rank one stage on. Only where is_last_stage is False."""
        assert not self.is_last_stage
        return self.rank - self.tp_size

    @property
    def previous_rank(self) -> int:
        """The same tensor-parallel rank one stage back. Only where is_first_stage is False."""
        assert not self.is_first_stage
        return self.rank + self.tp_size

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over the tensor-parallel group, in place. `x` must be contiguous."""
        if self.shared is not None:
            self.shared.all_reduce(x)
        elif self.tp_group is not None:
            dist.all_reduce(x, group=self.tp_group)
        return x

    def from_leader(self, x: Tensor) -> None:
        """Fill `x` with what it is on tensor-parallel rank 0. On all ranks of the group, in one order."""
        if self.tp_group is not None:
            dist.broadcast(x, src=self.rank - self.tp_rank, group=self.tp_group)

    def gather_columns(self, x: Tensor) -> Tensor | None:
        """[L, V / tp] of each rank to [L, V] float32 on tensor-parallel rank 0, None on the others."""
        if self.shared is not None:
            return self.shared.gather_columns(x)
        if self.tp_group is None:
            return x.float()
        root = self.rank - self.tp_rank
        is_gloo = dist.get_backend(self.tp_group) == "gloo"  # which gathers host memory only
        own = x.to("cpu" if is_gloo else x.device).contiguous()
        parts = [torch.empty_like(own) for _ in range(self.tp_size)] if self.tp_rank == 0 else None
        dist.gather(own, parts, dst=root, group=self.tp_group)
        return torch.cat(parts, dim=-1).to(x.device, torch.float32) if parts is not None else None


def join(
    rank: int, tp_size: int, pp_size: int, backend: str, init_file: Path, timeout: float
) -> dist.ProcessGroup | None:
    """Meet the other ranks over `init_file`. Returns this rank's tensor-parallel group, None if of one.
    `timeout`: seconds that a rank waits for another in any of the groups, at any time.

    Nothing listens for them but gloo's pairs on the loopback.
    """
    patience = timedelta(seconds=timeout)
    dist.init_process_group(
        backend,
        init_method=f"file://{init_file}",
        rank=rank,
        world_size=tp_size * pp_size,
        timeout=patience,
    )
    if tp_size == 1:
        return None
    stages = [range(stage * tp_size, (stage + 1) * tp_size) for stage in range(pp_size)]
    # Every rank makes those of all stages, as torch demands. They inherit no timeout, but have 30 minutes.
    groups: list[dist.ProcessGroup] = [dist.new_group(list(ranks), timeout=patience) for ranks in stages]
    return groups[rank // tp_size]


def single(device: torch.device | str = "cpu") -> Mesh:
    """The mesh of a process that is alone."""
    return Mesh(rank=0, tp_size=1, pp_size=1, device=torch.device(device))
