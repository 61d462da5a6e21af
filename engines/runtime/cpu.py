"""What the processor can do, as far as it decides how we compute."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor


def has_bfloat16() -> bool:
    """Whether it multiplies bfloat16 at speed: oneDNN wants AVX512-BW, -VL and -DQ, or AVX-NE-CONVERT."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def has_amx() -> bool:
    """Whether it multiplies whole tiles of bfloat16."""
    return torch.cpu._is_amx_tile_supported()


def compute_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What matrices of that dtype are best multiplied in: itself, but float32 where that is slow."""
    is_slow = device.type == "cpu" and dtype == torch.bfloat16 and not has_bfloat16()
    return torch.float32 if is_slow else dtype


def unmap_pages(tensor: Tensor) -> None:
    """Of a file's mapping, never written to: the process does without those that are this tensor's alone,
    until it reads them again."""
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > start:
        libc = ctypes.CDLL(None)
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


def release_memory() -> None:
    """Give the system back what was freed, which glibc keeps: after packing, a third of the weights."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
