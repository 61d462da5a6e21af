"""The C++ of this directory as functions.

Nothing needs them: where they cannot be had, or SLUICE_KERNELS=off is set, torch does the work, and the log
says why.
"""

from __future__ import annotations

import ctypes
import logging
import os
from ctypes import POINTER, Structure, byref, c_double, c_float, c_int, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from engines.kernels import build

log = logging.getLogger("sluice.engine")

SWITCH = "SLUICE_KERNELS"


class Matrix(Structure):
    """Mirrors Matrix of llama.cpp: addresses, none where there is no scale, bias or patch."""

    _fields_ = (
        ("weight", c_void_p),
        ("scale", c_void_p),
        ("bias", c_void_p),
        ("patch_starts", c_void_p),
        ("patch_columns", c_void_p),
        ("patch_values", c_void_p),
        ("keeps_rows", c_int32),
    )


class LayerWeights(Structure):
    """Mirrors Layer of llama.cpp."""

    _fields_ = (
        ("attention_norm", c_void_p),
        ("mlp_norm", c_void_p),
        ("qkv", Matrix),
        ("output", Matrix),
        ("gate_up", Matrix),
        ("down", Matrix),
        ("cache", c_void_p),
    )


class Model(Structure):
    """Mirrors Model of llama.cpp."""

    _fields_ = (
        ("layers", POINTER(LayerWeights)),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("hidden", c_int32),
        ("num_heads", c_int32),
        ("num_kv_heads", c_int32),
        ("head_dim", c_int32),
        ("intermediate", c_int32),
        ("block_size", c_int32),
        ("eps", c_float),
        ("scale", c_float),
    )


class Step(Structure):
    """Mirrors Step of llama.cpp."""

    _fields_ = (
        ("positions", c_void_p),
        ("slots", c_void_p),
        ("sequences", c_void_p),
        ("tables", c_void_p),
        ("num_tokens", c_int32),
        ("table_width", c_int32),
        ("max_context", c_int32),
        ("num_threads", c_int32),
        ("is_deterministic", c_int32),
    )


class Chosen(Structure):
    """Mirrors Chosen of llama.cpp."""

    _fields_ = (
        ("rows", c_void_p),
        ("step", Step),
    )


class Ranks(Structure):
    """Mirrors Ranks of ranks.h: the memory that the tensor-parallel ranks share, see shared_memory.py."""

    _fields_ = (
        ("counters", c_void_p),
        ("halves", c_void_p),
        ("capacity", c_int64),
        ("operation", c_int64),
        ("rank", c_int32),
        ("size", c_int32),
        ("timeout", c_double),
    )


@dataclass(frozen=True, slots=True)
class Weight:
    """What a linear multiplies with: [out, in], for int8 with a float32 scale an output; contiguous.

    Packed bfloat16 (see pack.h) is uint8 [out, in * 3 / 2], with scales and patches.

    `keeps_rows`: many rows of bfloat16 by an int8 weight stay what they are. Else each 256 numbers of one get
    8 bits and a scale, where that is faster.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: Tensor | None = None
    keeps_rows: bool = True
    patches: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def num_inputs(self) -> int:
        num_bytes = self.weight.shape[1]
        return num_bytes * 2 // 3 if self.weight.dtype == _PACKED else num_bytes

    def matrix(self) -> Matrix:
        """Valid as long as this is."""
        parts = (self.weight, self.scale, self.bias, *(self.patches or (None,) * 3))
        return Matrix(*(None if part is None else part.data_ptr() for part in parts), self.keeps_rows)


_BYTES_A_THREAD = 5 << 20
_ROWS_A_READ = 3


def threads_for(num_bytes: int, num_rows: int) -> int:
    """How many threads are worth it, at most, to multiply so many bytes of weights by so many rows.

    Each should have 0.3 ms to do: a thread reads 17 GB/s, and multiplies three rows in that time. For less,
    the threads' waits for each other, long beside other processes that want the cores, cost what they gain.
    """
    work = num_bytes * max(_ROWS_A_READ, num_rows) // _ROWS_A_READ
    return min(torch.get_num_threads(), 1 + work // _BYTES_A_THREAD)


_PACKED = torch.uint8
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.int8: "int8", _PACKED: "packed"}
_GROUP = 64  # numbers that are packed together
_NUMBERS_A_PATCH = 512  # at least: each costs as much as a vector of numbers


class Library:
    """What was compiled. `pair_width`: the dimensions that are summed over must be multiples of it."""

    def __init__(self, path: Path) -> None:
        functions = ctypes.CDLL(os.fspath(path))
        self.pair_width: int = functions.sluice_pair_width()
        self._run, self._linear, self._norm = {}, {}, {}
        self._can_pack = hasattr(functions, "sluice_pack")
        if self._can_pack:
            self._find_patches, self._pack = functions.sluice_find_patches, functions.sluice_pack
            self._find_patches.argtypes = [c_void_p, c_int, c_int, c_int64, c_int, c_void_p]
            self._find_patches.restype = c_int64
            self._pack.argtypes = [c_void_p, c_int, c_int, c_int, *[c_void_p] * 5]
            self._pack.restype = None
        for values in (torch.float32, torch.bfloat16):
            self._norm[values] = norm = functions[f"sluice_norm_{_NAMES[values]}"]
            norm.argtypes = [c_void_p] * 3 + [c_int, c_int, c_float, c_int]
            norm.restype = None
            packed = [_PACKED] if self._can_pack and values == torch.bfloat16 else []
            for weights in (values, torch.int8, *packed):
                name = f"{_NAMES[values]}_{_NAMES[weights]}"
                run, linear = functions[f"sluice_run_{name}"], functions[f"sluice_linear_{name}"]
                structs = POINTER(Ranks), POINTER(Chosen)
                run.argtypes = [POINTER(Model), POINTER(Step), c_int, c_void_p, *structs]
                linear.argtypes = [POINTER(Matrix), c_void_p, c_void_p, *[c_int] * 6]
                run.restype, linear.restype = c_int64, None
                self._run[values, weights], self._linear[values, weights] = run, linear

    def takes(self, values: torch.dtype, weight: Tensor) -> bool:
        """Whether `linear` multiplies values of that dtype by this weight."""
        is_cpus = weight.device.type == "cpu"
        return is_cpus and (values, weight.dtype) in self._linear and weight.shape[1] % self.pair_width == 0

    def pack(self, weight: Weight) -> Weight | None:
        """The same in three quarters of the room, to the bit; None where it cannot be."""
        values = weight.weight
        is_plain = values.dtype == torch.bfloat16 and weight.scale is None and values.is_contiguous()
        if not (self._can_pack and is_plain and values.shape[1] % _GROUP == 0):
            return None
        (num_rows, num_k), num_threads = values.shape, torch.get_num_threads()
        starts = torch.empty(num_rows + 1, dtype=torch.int64)
        most = values.numel() // _NUMBERS_A_PATCH
        sizes = num_rows, num_k
        found: int = self._find_patches(values.data_ptr(), *sizes, most, num_threads, starts.data_ptr())
        if found < 0:
            return None
        packed = torch.empty(num_rows, num_k * 3 // 2, dtype=_PACKED)
        scale, columns = torch.empty(num_rows), torch.empty(found, dtype=torch.int32)
        patches = starts, columns, torch.empty(found)
        out = [tensor.data_ptr() for tensor in (starts, packed, scale, columns, patches[2])]
        self._pack(values.data_ptr(), *sizes, num_threads, *out)
        return Weight(packed, weight.bias, scale, patches=patches)

    def linear(
        self, weight: Weight, x: Tensor, *, is_deterministic: bool = False, dtype: torch.dtype | None = None
    ) -> Tensor:
        """x [T, in], contiguous, to [T, out]; deterministic: no row depends on how many there are.

        `dtype`: of the result, x's or float32, into which it goes after it was rounded to x's.
        """
        (num_rows, num_k), num_n = x.shape, weight.weight.shape[0]
        out = x.new_empty(num_rows, num_n, dtype=dtype)
        run = self._linear[x.dtype, weight.weight.dtype]
        num_threads = threads_for(weight.weight.nbytes, num_rows)
        addresses = byref(weight.matrix()), x.data_ptr(), out.data_ptr()
        in_float32 = out.dtype == torch.float32
        run(*addresses, num_rows, num_k, num_n, num_threads, is_deterministic, in_float32)
        return out

    def takes_norm(self, weight: Tensor) -> bool:
        """Whether `norm` takes values of this weight's size and dtype."""
        is_cpus = weight.device.type == "cpu" and weight.is_contiguous()
        return is_cpus and weight.dtype in self._norm and len(weight) % self.pair_width == 0

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x [T, H], contiguous, over the root mean square of each row, times `weight`."""
        out = torch.empty_like(x)
        num_rows, size = x.shape
        run = self._norm[x.dtype]
        num_threads = threads_for(x.nbytes, 1)
        run(x.data_ptr(), weight.data_ptr(), out.data_ptr(), num_rows, size, eps, num_threads)
        return out

    def run(
        self,
        model: Model,
        weights: torch.dtype,
        step: Step,
        num_layers: int,
        hidden: Tensor,
        ranks: Ranks | None = None,
        chosen: Chosen | None = None,
    ) -> int:
        """The model's layers, with matrices of dtype `weights`, change `hidden` [T, H]: shares of them, where
        there are several `ranks`, summed in two operations a layer. Of the last layer only the rows that are
        `chosen`, if any are. Returns the operation that a rank did not come to in time, or 0."""
        run = self._run[hidden.dtype, weights]
        others = (None if given is None else byref(given) for given in (ranks, chosen))
        failed: int = run(byref(model), byref(step), num_layers, hidden.data_ptr(), *others)
        return failed


def load() -> Library | None:
    """The library for this processor, compiled if need be; None where it cannot be had."""
    found = _load()
    return found if isinstance(found, Library) else None


def reason() -> str:
    """Why there is none; "" where there is one."""
    found = _load()
    return "" if isinstance(found, Library) else found


@cache
def _load() -> Library | str:
    if os.environ.get(SWITCH) == "off":
        return f"are switched off ({SWITCH}=off)"
    try:
        return Library(build.find())
    except (build.Unavailable, OSError) as error:
        log.warning("kernels: none, torch does the work, which is slower: %s", error)
        return f"cannot be had: {error}"
