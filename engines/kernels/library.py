"""The C++ of this directory as functions.

Nothing needs them: where they cannot be had, or SLUICE_KERNELS=off is set, torch does the work, and the log
says why.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Collection
from ctypes import POINTER, Structure, byref, c_float, c_int, c_int32, c_void_p
from enum import IntFlag
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from engines.kernels import build

log = logging.getLogger("sluice.engine")

SWITCH = "SLUICE_KERNELS"


class Parts(IntFlag):
    """Of a layer, each with its norm before it. Mirrors Parts of llama.cpp."""

    ATTENTION = 1
    MLP = 2
    ALL = 3


class LayerWeights(Structure):
    """Mirrors Layer of llama.cpp: addresses, none where there is no bias."""

    _fields_ = (
        ("attention_norm", c_void_p),
        ("qkv", c_void_p),
        ("qkv_bias", c_void_p),
        ("output", c_void_p),
        ("output_bias", c_void_p),
        ("mlp_norm", c_void_p),
        ("gate_up", c_void_p),
        ("gate_up_bias", c_void_p),
        ("down", c_void_p),
        ("down_bias", c_void_p),
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
    )


class Library:
    """What was compiled. `pair_width`: the dimensions that are summed over must be multiples of it."""

    def __init__(self, path: Path) -> None:
        functions = ctypes.CDLL(os.fspath(path))
        self.pair_width: int = functions.sluice_pair_width()
        self._run, self._linear = {}, {}
        for dtype, name in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16")):
            run, linear = functions[f"sluice_run_{name}"], functions[f"sluice_linear_{name}"]
            run.argtypes = [POINTER(Model), POINTER(Step), c_int, c_int, c_int, c_void_p, c_void_p]
            linear.argtypes = [c_void_p] * 4 + [c_int] * 4
            run.restype = linear.restype = None
            self._run[dtype], self._linear[dtype] = run, linear

    @property
    def dtypes(self) -> Collection[torch.dtype]:
        return self._run.keys()

    def linear(self, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
        """x [T, in] @ weight.T + bias; all contiguous and of one of `dtypes`."""
        (num_rows, num_k), num_n = x.shape, weight.shape[0]
        out = x.new_empty(num_rows, num_n)
        tensors = (weight, bias, x, out)
        addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        self._linear[x.dtype](*addresses, num_rows, num_k, num_n, torch.get_num_threads())
        return out

    def run(
        self, model: Model, step: Step, layers: range, parts: Parts, hidden: Tensor, out: Tensor | None
    ) -> None:
        """`parts` of `layers` change `hidden` [T, H], or put what they would add to it into `out`."""
        into = None if out is None else out.data_ptr()
        run = self._run[hidden.dtype]
        run(byref(model), byref(step), layers.start, layers.stop, parts, hidden.data_ptr(), into)


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
