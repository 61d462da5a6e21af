"""A Llama's layers in one call of our own kernels.

A step of few tokens is as fast as its weights are read, if nothing stands between; torch's operations, called
one by one, take longer than the weights of a small model. Where torch's matrices are the faster for more
tokens (AMX), larger steps go through the layers' own modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import pointer
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from engines.base import Batch
from engines.kernels import library
from engines.models.layers import MOST_ROWS, KernelLinear, is_torch_faster, not_deterministic
from engines.runtime.context import current
from engines.runtime.kv_cache import LayerCache, Layout
from engines.runtime.shared_memory import CAPACITY

if TYPE_CHECKING:
    from engines.models.llama import Layer, Llama

_AT_ONCE, _AT_ONCE_DETERMINISTIC = 320, 32
"""Of a step's tokens, at most: what the layers hand on stays in the caches."""
_SIDE_BY_SIDE = 32
"""Tokens that are multiplied together: what one token costs, so many do."""
_MAX_HEAD_DIM = 256  # that of attention.h


class KernelLayers:
    """The layers of `model`, this rank's share of each. It reads the weights where the modules have them."""

    @classmethod
    def of(cls, model: Llama) -> KernelLayers | None:
        """None where a kernel is missing for any of the layers."""
        operands = [_operands(layer) for layer in model.layers]
        has_peers = model.mesh.tp_size == 1 or model.mesh.shared is not None
        if not has_peers or not all(operands):
            return None
        kernels = library.load()
        if kernels is None:
            return None
        has_mixed = any(len({operand.weight.dtype for operand in layer}) > 1 for layer in operands)
        head_dim = model.layers[0].attention.head_dim
        if has_mixed or head_dim > _MAX_HEAD_DIM or head_dim % kernels.pair_width:
            return None
        return cls(kernels, model, operands)

    def __init__(
        self, kernels: library.Library, model: Llama, operands: Sequence[Sequence[library.Weight]]
    ) -> None:
        self._kernels, self._mesh = kernels, model.mesh
        self._weights = (library.LayerWeights * len(operands))()
        for weights, layer, (qkv, output, gate_up, down) in zip(
            self._weights, model.layers, operands, strict=True
        ):
            weights.attention_norm = layer.attention_norm.weight.data_ptr()
            weights.mlp_norm = layer.mlp_norm.weight.data_ptr()
            weights.qkv, weights.output = qkv.matrix(), output.matrix()
            weights.gate_up, weights.down = gate_up.matrix(), down.matrix()
        self._caches: Sequence[LayerCache] = ()
        self.takes_all = not is_torch_faster(model.rotary.cos.dtype)
        self.is_deterministic = False
        attention, rotary, config = model.layers[0].attention, model.rotary, model.config
        self._kept = (model.layers, rotary)  # the addresses are theirs
        self._has_last = model.is_last
        down = operands[0][-1]
        by_dtype = groupby(range(len(operands)), lambda layer: operands[layer][0].weight.dtype)
        self._runs = [(dtype, list(layers)) for dtype, layers in by_dtype]  # each a call
        self._num_bytes = sum(operand.weight.nbytes for layer in operands for operand in layer)
        self._model = library.Model(
            cos=rotary.cos.data_ptr(),
            sin=rotary.sin.data_ptr(),
            hidden=config.hidden_size,
            num_heads=attention.num_heads,
            num_kv_heads=attention.num_kv_heads,
            head_dim=attention.head_dim,
            intermediate=down.num_inputs,
            eps=config.rms_norm_eps,
            scale=attention.scale,
        )

    @property
    def _most_at_once(self) -> int:
        """Of a step's tokens."""
        most = _AT_ONCE_DETERMINISTIC if self.is_deterministic else _AT_ONCE
        if self._mesh.shared is None:
            return most
        row_bytes: int = self._model.hidden * self._caches[0].data.itemsize
        return min(most, CAPACITY // row_bytes)

    def takes(self, hidden: Tensor) -> bool:
        """Whether it is worth it for a step of so many tokens."""
        return self.takes_all or hidden.shape[0] <= MOST_ROWS

    def run(self, hidden: Tensor) -> Tensor:
        """[T, H] through all layers, in place, some at a time. Inside a forward context.

        After the model's last layer only the rows that are read, as the batch says, are what they should be.
        """
        context = current()
        self._use(context.caches)
        num_tokens = hidden.shape[0]
        threads = library.threads_for(self._num_bytes, num_tokens)
        tokens = _Tokens(context.batch, self.is_deterministic, threads)
        at_once = _tokens_at_once(num_tokens, self._most_at_once)
        for first in range(0, num_tokens, at_once):
            piece = hidden[first : first + at_once]
            chosen = tokens.chosen(first, piece.shape[0]) if self._has_last else None
            self._run(piece, tokens.step(first, piece.shape[0]), chosen)
        return hidden

    def _run(self, hidden: Tensor, step: library.Step, chosen: library.Chosen | None) -> None:
        shared, ranks = self._mesh.shared, None
        for weights, layers in self._runs:
            self._model.layers = pointer(self._weights[layers[0]])
            if shared is not None:
                addresses, operation = shared.addresses, shared.num_operations
                ranks = library.Ranks(
                    *addresses, CAPACITY, operation, shared.rank, shared.size, shared.timeout
                )
            of_these = chosen if layers is self._runs[-1][1] else None
            failed = self._kernels.run(self._model, weights, step, len(layers), hidden, ranks, of_these)
            if shared is None:
                continue
            if failed:
                raise shared.late(failed)
            shared.num_operations += 2 * len(layers)

    def _use(self, caches: Sequence[LayerCache]) -> None:
        if caches is self._caches:
            return
        assert all(cache.layout is Layout.GATHER for cache in caches)
        self._caches, self._model.block_size = caches, caches[0].block_size
        for weights, cache in zip(self._weights, caches, strict=True):
            weights.cache = cache.data.data_ptr()


def _tokens_at_once(num_tokens: int, most: int) -> int:
    """As equal as can be: each piece reads all weights, were it of a single token."""
    num_pieces = -(-num_tokens // most)
    return min(most, -(-num_tokens // (num_pieces * _SIDE_BY_SIDE)) * _SIDE_BY_SIDE)


def require_deterministic(layers: KernelLayers | None) -> KernelLayers:
    """Have them take steps of any size: in a kernel of ours a token's result depends on no other's, and not
    on how its prompt was cut into steps. Raises UnsupportedModel where there are none."""
    if layers is None:
        raise not_deterministic(library.reason() or "do not fit its sizes")
    layers.takes_all = layers.is_deterministic = True
    return layers


class _Tokens:
    """The batch as the kernels read it. Keeps alive what the steps point to."""

    def __init__(self, batch: Batch, is_deterministic: bool, num_threads: int) -> None:
        self._batch, self._tables = batch, batch.block_tables.contiguous()
        self._is_deterministic, self._num_threads = is_deterministic, num_threads
        sequences = np.arange(batch.num_seqs, dtype=np.int32)
        if batch.max_query_len > 1:
            sequences = np.repeat(sequences, np.diff(batch.query_start_list))
        self._arrays = batch.positions.numpy(), batch.slot_mapping.numpy(), sequences
        reads_all = batch.reads_all or batch.max_query_len == 1
        self._read = None if reads_all else np.unique(batch.logit_rows.numpy())
        self._kept: list[np.ndarray] = []

    def step(self, start: int, count: int) -> library.Step:
        """For `count` of the tokens."""
        return self._step([array[start : start + count] for array in self._arrays])

    def chosen(self, start: int, count: int) -> library.Chosen | None:
        """Those of them that are read; None if all are."""
        if self._read is None:
            return None
        rows = self._read[slice(*np.searchsorted(self._read, [start, start + count]))] - start
        if len(rows) == count:
            return None
        if not len(rows):
            rows = np.array([count - 1])  # no step is without tokens
        arrays = [array[start + rows] for array in self._arrays]
        self._kept += [*arrays, rows := rows.astype(np.int32)]
        return library.Chosen(rows.ctypes.data, self._step(arrays))

    def _step(self, arrays: Sequence[np.ndarray]) -> library.Step:
        positions, slots, sequences = arrays
        return library.Step(
            positions=positions.ctypes.data,
            slots=slots.ctypes.data,
            sequences=sequences.ctypes.data,
            tables=self._tables.data_ptr(),
            num_tokens=len(positions),
            table_width=self._tables.shape[1],
            max_context=self._batch.max_context_len,
            num_threads=self._num_threads,
            is_deterministic=self._is_deterministic,
        )


def _operands(layer: Layer) -> list[library.Weight]:
    """Of its four linears; none where one of them is no kernel of ours."""
    found = [linear.operand for linear in layer.linears if isinstance(linear, KernelLinear)]
    return found if len(found) == len(layer.linears) else []
