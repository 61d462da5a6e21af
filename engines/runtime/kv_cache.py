"""The paged keys and values of one rank: how large, and the tensors themselves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engines.base import KVSpec


@dataclass(frozen=True, slots=True, eq=False)
class LayerCache:
    """Keys and values of one layer; slot = block * block_size + offset counts through the first two dims."""

    key: Tensor  # [num_blocks, block_size, Hkv, D]
    value: Tensor  # [num_blocks, block_size, Hkv, D]

    @property
    def block_size(self) -> int:
        return self.key.shape[1]


class TooLittleMemory(ValueError):  # noqa: N818
    """No room for the K/V of a single sequence. Says the sums."""


def allocate(spec: KVSpec, num_blocks: int, block_size: int) -> list[LayerCache]:
    """Zeroed caches, one a layer of `spec`, each on its layer's device.

    Zeroed, because attention multiplies what it masks by 0, and 0 * NaN is NaN.
    """
    shape = (num_blocks, block_size, spec.num_kv_heads, spec.head_dim)
    return [
        LayerCache(
            torch.zeros(shape, dtype=spec.dtype, device=device),
            torch.zeros(shape, dtype=spec.dtype, device=device),
        )
        for device in spec.devices
    ]


def num_blocks_for(spec: KVSpec, budget_bytes: int, block_size: int) -> int:
    """How many blocks a budget of bytes holds. Raises TooLittleMemory if it holds none."""
    block_bytes = spec.bytes_per_token() * block_size
    num_blocks = budget_bytes // block_bytes
    if num_blocks < 1:
        raise TooLittleMemory(
            f"{budget_bytes / 2**20:.1f} MiB are left for the K/V cache and one block of {block_size} tokens "
            f"takes {block_bytes / 2**20:.1f} MiB: give it more memory, or use smaller blocks"
        )
    return num_blocks


def cuda_budget(share: float, total_bytes: int, used_bytes: int) -> int:
    """Bytes for K/V on a device: the stated share of the total, less what this process uses of it.

    Not "what is free": two groups that start together would both count the same memory. `used_bytes`
    is the peak since start, weights and a warm-up step of the largest size included.
    """
    return max(int(total_bytes * share) - used_bytes, 0)


def cuda_budget_of(device: torch.device, share: float) -> int:
    """`cuda_budget` of a real device after a warm-up step."""
    total = torch.cuda.get_device_properties(device).total_memory
    return cuda_budget(share, total, torch.cuda.max_memory_reserved(device))
