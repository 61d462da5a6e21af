"""What a GPU can do for us, said without Triton. The other modules here need it; nothing else imports it."""

from __future__ import annotations

import inspect
from functools import cache
from importlib.util import find_spec

import torch


@cache
def has_kernels(device_type: str) -> bool:
    """Whether our Triton kernels run on devices of that type. torch's builds for CUDA bring Triton."""
    return device_type == "cuda" and find_spec("triton") is not None


@cache
def varlen_is_paged() -> bool:
    """Whether this torch's varlen_attn takes a block table: its arguments differ between versions."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    names = inspect.signature(varlen_attn).parameters
    return {"seqused_k", "block_table", "window_size", "enable_gqa"} <= names.keys()


def has_flash(device_type: str, dtype: torch.dtype, head_dim: int, block_size: int) -> bool:
    """Whether torch's paged FlashAttention takes such K/V: half precision, heads up to 256, pages of 256."""
    is_half_on_cuda = device_type == "cuda" and dtype in (torch.float16, torch.bfloat16)
    fits = head_dim <= 256 and head_dim % 8 == 0 and block_size % 256 == 0
    return is_half_on_cuda and fits and varlen_is_paged()
