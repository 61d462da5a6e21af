"""How kernels are launched that have a program for each row of a matrix, all of the row in it."""

from __future__ import annotations

import triton


def whole_row(width: int) -> dict[str, int]:
    """For rows of so many values: the kernel's BLOCK, and warps with 512 of them each."""
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512))}
