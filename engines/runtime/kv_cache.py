"""The paged keys and values of one rank: how large, how laid out, and the tensors themselves."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engines.base import Batch, KVSpec
from engines.gpu import support
from engines.runtime.pages_ahead import PagesAhead, Region
from engines.runtime.transfer import to_device

Integers = NDArray[np.integer]


class Layout(Enum):
    """How a layer's K/V lies in memory: as its attention backend reads it fastest."""

    GATHER = "gather"  # [num_blocks, 2, Hkv, block_size, D]: one head's part of a block is one copy
    PAGED = "paged"  # [2, num_blocks, block_size, Hkv, D]: as the kernels of a GPU read it


@dataclass(frozen=True, slots=True, eq=False)
class LayerCache:
    """Keys and values of one layer. Slot = block * block_size + offset."""

    data: Tensor
    layout: Layout

    @property
    def block_size(self) -> int:
        return self.data.shape[3 if self.layout is Layout.GATHER else 2]

    @property
    def num_kv_heads(self) -> int:
        return self.data.shape[2 if self.layout is Layout.GATHER else 3]


def begun_blocks(batch: Batch, cache: LayerCache) -> Tensor | None:
    """The blocks whose first token this step writes and whose last it does not, on the cache's device.
    None: there are none, as in most steps."""
    lengths, contexts = np.diff(batch.query_start_list), np.array(batch.context_lens_list)
    places = begun_places(lengths, contexts, cache.block_size)
    if not len(places[0]):
        return None
    rows, columns = (to_device(part, batch.block_tables.device, torch.int64) for part in places)
    return batch.block_tables[rows, columns].to(cache.data.device, torch.int64)


def begun_places(
    query_lens: Integers | int, contexts: Integers, block_size: int
) -> tuple[Integers, Integers]:
    """Rows and columns of a step's block tables: the blocks whose first token it writes and whose last it
    does not. [S] each, or one length for all."""
    offsets = contexts % block_size
    rows = np.flatnonzero((offsets > 0) & (offsets <= query_lens))
    return rows, contexts[rows] // block_size


def clear_blocks(caches: Sequence[LayerCache], blocks: Tensor) -> None:
    """Zeros into these blocks of every layer; their caches are all on one device."""
    for cache in caches:
        cache.data.index_fill_(0 if cache.layout is Layout.GATHER else 1, blocks, 0.0)


class TooLittleMemory(ValueError):  # noqa: N818
    """No room for a single block of K/V. Says the sums."""


def allocate(spec: KVSpec, num_blocks: int, block_size: int) -> list[LayerCache]:
    """Zeroed caches, one a layer of `spec`, each on its layer's device."""
    return [_allocate_layer(spec, device, num_blocks, block_size) for device in spec.devices]


def _allocate_layer(spec: KVSpec, device: torch.device, num_blocks: int, block_size: int) -> LayerCache:
    layout = layout_for(device, spec.dtype, spec.head_dim, block_size)
    heads, head_dim = spec.num_kv_heads, spec.head_dim
    if layout is Layout.GATHER:
        shape = (num_blocks, 2, heads, block_size, head_dim)
    else:
        shape = (2, num_blocks, block_size, heads, head_dim)
    return LayerCache(_zeros(shape, spec.dtype, device), layout)


def pages_ahead(caches: Sequence[LayerCache]) -> PagesAhead | None:
    """For caches of `allocate` that lie in a processor's own memory."""
    if not caches or any(cache.data.device.type != "cpu" for cache in caches):
        return None
    regions = [Region(cache.data.data_ptr(), cache.data[0].nbytes) for cache in caches]
    return PagesAhead(regions, num_blocks=caches[0].data.shape[0])


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that, on a CPU, take memory only once they are written: a fresh mapping, page by page.

    Of huge pages, where Linux has them to give: every page of a long context is looked up at every step.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(AttributeError, OSError):  # no such advice on this system, or no such pages in its kernel
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


def layout_for(device: torch.device, dtype: torch.dtype, head_dim: int, block_size: int) -> Layout:
    """PAGED on GPUs, where there is a kernel that reads it so; else GATHER."""
    has_flash = support.has_flash(device.type, dtype, head_dim, block_size)
    return Layout.PAGED if has_flash or support.has_kernels(device.type) else Layout.GATHER


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
