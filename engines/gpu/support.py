"""What a GPU can do for us, said without Triton. The other modules here need it; nothing else imports it."""

from __future__ import annotations

import inspect
import logging
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger("sluice.worker")


@cache
def has_kernels(device_type: str) -> bool:
    """Whether our Triton kernels run on devices of that type.

    torch's builds for CUDA bring Triton, which compiles a launcher with the machine's C compiler.
    """
    if device_type != "cuda" or find_spec("triton") is None:
        return False
    if not torch.cuda.is_available():  # what is asked is what a GPU would do
        return True
    from triton.runtime.driver import driver

    try:
        driver.active.utils  # noqa: B018  compiled when first asked for
    except Exception as error:  # whatever a compiler, a loader or a driver says
        log.warning("without Triton kernels, which are faster: %s", " ".join(str(error).split()))
        return False
    return True


@cache
def varlen_is_paged() -> bool:
    """Whether this torch's varlen_attn takes a block table: its arguments differ between versions, and so
    does what the kernels below it take. Where there is a GPU it is tried."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    names = inspect.signature(varlen_attn).parameters
    if not {"seqused_k", "block_table", "window_size", "enable_gqa"} <= names.keys():
        return False
    return not torch.cuda.is_available() or _takes_pages()


def paged_flash(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    tables: Tensor,
    max_query_len: int,
    max_context: int,
    scale: float,
) -> Tensor:
    """torch's FlashAttention over pages, causal: [T, Hq, D] to the same. keys, values: [num_blocks,
    block_size, Hkv, D]. query_start [S + 1], context_lens [S] and tables [S, W]: int32."""
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(
        query,
        keys,
        values,
        query_start,
        query_start,  # looked at for its shape only: contexts are as long as seqused_k says
        max_query_len,
        max_context,
        scale=scale,
        window_size=(-1, 0),  # causal, aligned to the end of the context
        enable_gqa=True,
        seqused_k=context_lens,
        block_table=tables,
        **_one_split(),
    )
    assert isinstance(out, Tensor)  # a pair only where return_aux is asked for
    return out


@cache
def _one_split() -> dict[str, Any]:
    """What keeps varlen_attn from cutting contexts into parts, for those versions that can: joining the parts
    of paged sequences, FlashAttention-2 leaves all but the first unwritten (pytorch/pytorch#194167)."""
    from torch.nn.attention.varlen import varlen_attn

    return {"num_splits": 1} if "num_splits" in inspect.signature(varlen_attn).parameters else {}


def _takes_pages() -> bool:
    query = torch.zeros(2, 2, 64, dtype=torch.bfloat16, device="cuda")
    pages = torch.zeros(1, 256, 1, 64, dtype=torch.bfloat16, device="cuda")
    starts, lens, tables = (
        torch.tensor(values, dtype=torch.int32, device="cuda") for values in ([0, 2], [2], [[0]])
    )
    try:
        paged_flash(query, pages, pages, starts, lens, tables, 2, 256, scale=0.125)
        torch.cuda.synchronize()
    except RuntimeError as error:
        log.warning(
            "prompts are attended sequence by sequence, which is slower: %s", str(error).split("\n")[0]
        )
        return False
    return True


def has_flash(device_type: str, dtype: torch.dtype, head_dim: int, block_size: int) -> bool:
    """Whether torch's paged FlashAttention takes such K/V: half precision, heads up to 256, pages of 256."""
    is_half_on_cuda = device_type == "cuda" and dtype in (torch.float16, torch.bfloat16)
    fits = head_dim <= 256 and head_dim % 8 == 0 and block_size % 256 == 0
    return is_half_on_cuda and fits and varlen_is_paged()
