"""Logits to tokens, on rank 0. Greedy rows cost one argmax; the others share vectorised filters.

`sample` only starts: where a device queues its work nothing here waits for it, until `Drawn.result` does.

Order: penalties, bias, bans, grammars; then temperature, top_k, top_p, min_p; then one draw by inverse CDF in
vocabulary order. Log-probabilities are of the model's own distribution, before all of that.

A row harms no other: what raises for many rows at once is done again row by row, and a row whose largest
logit is not a number (anything that is not finite in a sequence's K/V makes its logits so) is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engines.gpu import support
from engines.runtime.faults import failed
from engines.runtime.grammar import token_masks
from engines.runtime.plan import Int32, RowSampling, RowUse, StepResult
from engines.runtime.random import uniforms
from engines.runtime.transfer import Arriving, to_device
from engines.wire import RequestError, TokenLogprob

Positions = Callable[[], Int32]
_FIRST_TOP = 1024
"""How many candidates to sort before giving up on a short list: top_p rarely needs more."""


def sample(
    logits: Tensor, rows: Sequence[RowSampling], row_use: Sequence[int], positions: Positions
) -> Drawn:
    """Draw a token for every row.

    Args:
        logits: [L, V] float32; changed in place.
        rows: how to treat each row.
        row_use: RowUse of each row; only rows for SAMPLE and VERIFY draw.
        positions: gives those of the tokens that the rows draw [L], counted from their sequences' first;
            asked for only if one is drawn at random.
    """
    errors: dict[int, RequestError] = {}
    asked = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
    raw = _log_softmax(logits, asked) if asked else logits  # before anything is adjusted
    drawn = [i for i, use in enumerate(row_use) if use in _DRAWN]
    for i in filter(lambda i: _is_adjusted(rows[i]), drawn):
        _guarded([i], lambda own: _adjust_row(logits[own[0]], rows[own[0]]), "penalties and biases", errors)
    constrained = [i for i in drawn if rows[i].constraint is not None]
    _guarded(constrained, lambda some: _constrain(logits, rows, some), "its grammar", errors)
    tokens, is_finite = _likeliest(logits)
    random = [i for i in drawn if rows[i].params.temperature > 0 and i not in errors]
    _guarded(random, lambda some: _put_random(tokens, logits, rows, positions, some), "sampling", errors)
    if len(drawn) < len(rows):
        _put_targets(tokens, rows, row_use)
    logprobs: list[_Logprobs] = []
    unharmed = [i for i in asked if i not in errors]
    _guarded(
        unharmed, lambda some: logprobs.append(_logprobs(raw, asked, rows, tokens, some)), "logprobs", errors
    )
    return Drawn(tokens, is_finite, logprobs, errors)


class Drawn:
    """What `sample` drew: on the device at once, on the host once it has come there."""

    def __init__(
        self, tokens: Tensor, is_finite: Tensor, logprobs: list[_Logprobs], errors: dict[int, RequestError]
    ) -> None:
        self.tokens = tokens  # [L] int64; of a row in error any
        self._tokens, self._is_finite = Arriving(tokens), Arriving(is_finite)
        self._logprobs, self._errors = logprobs, errors

    def result(self) -> StepResult:
        """Waits for it."""
        tokens, errors = self._tokens.get().astype(np.int32), self._errors
        is_finite = self._is_finite.get()
        if np.count_nonzero(is_finite) < len(tokens):
            for i in np.flatnonzero(~is_finite).tolist():
                errors.setdefault(i, RequestError("internal", "the model gave logits that are not finite"))
        logprobs: dict[int, TokenLogprob] = {}
        for some in self._logprobs:
            logprobs.update(some.result(errors))
        if errors:
            tokens[list(errors)] = -1
        return StepResult(tokens, logprobs, errors)


_DRAWN = (RowUse.SAMPLE, RowUse.VERIFY)


def _guarded(
    rows: list[int], work: Callable[[list[int]], object], name: str, errors: dict[int, RequestError]
) -> None:
    """`work(rows)`; if that raises, `work([row])` for each, and those that still raise are in error."""
    if not rows:
        return
    try:
        work(rows)
    except Exception as error:  # whatever it is, it is somebody's own
        if len(rows) == 1:
            errors[rows[0]] = failed(name, error)
            return
        for row in rows:
            _guarded([row], work, name, errors)


def _likeliest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """[L, V] to its largest of each row [L], and whether that is finite: it is NaN where anything is."""
    if logits.is_cpu:  # where numpy is 12 to 20 times as fast as torch
        values = logits.numpy()
        tokens = values.argmax(-1)
        is_finite = np.isfinite(values[np.arange(len(tokens)), tokens])
        return torch.from_numpy(tokens), torch.from_numpy(is_finite)
    largest, best = logits.max(-1)
    return best, largest.isfinite()


def _put_targets(tokens: Tensor, rows: Sequence[RowSampling], row_use: Sequence[int]) -> None:
    """Into `tokens`, for the rows that draw none."""
    undrawn = [i for i, use in enumerate(row_use) if use not in _DRAWN]
    targets = to_device([rows[i].target_id for i in undrawn], tokens.device, torch.int64)
    tokens.index_copy_(0, to_device(undrawn, tokens.device, torch.int64), targets)


def _some_rows(values: Tensor, rows: Sequence[int]) -> Tensor:
    """A copy of these, or all of them as they lie."""
    if len(rows) == len(values):
        return values
    return values.index_select(0, to_device(rows, values.device, torch.int64))


def _is_adjusted(row: RowSampling) -> bool:
    return bool(len(row.token_ids) or row.params.logit_bias or row.banned_ids)


def _constrain(logits: Tensor, rows: Sequence[RowSampling], some: list[int]) -> None:
    """-inf where the grammars of `some` rows do not go on. On a GPU the masks are made while it computes."""
    constraints = [(own, rows[i].banned_ids) for i in some if (own := rows[i].constraint) is not None]
    vocab_size = logits.shape[1]
    masks = token_masks(constraints, vocab_size)
    is_out = _unpacked(~masks.view(np.uint8), logits.device)[:, :vocab_size]
    if len(some) == len(rows):
        logits.masked_fill_(is_out, -torch.inf)
    else:
        index = to_device(some, logits.device, torch.int64)
        logits.index_copy_(0, index, logits.index_select(0, index).masked_fill_(is_out, -torch.inf))


def _unpacked(packed: np.ndarray, device: torch.device) -> Tensor:
    """[R, B] bytes to [R, 8 B] bools, the lowest bit first. On a GPU only the bytes travel."""
    if device.type == "cpu":
        return torch.from_numpy(np.unpackbits(packed, axis=1, bitorder="little")).view(torch.bool)
    places = torch.arange(8, dtype=torch.uint8, device=device)
    bits = to_device(packed, device, torch.uint8).unsqueeze(-1) >> places
    return bits.bitwise_and_(1).view(torch.bool).flatten(1)


def _adjust_row(logits: Tensor, row: RowSampling) -> None:
    params = row.params
    if len(row.token_ids):
        _penalise(logits, row)
    if params.logit_bias:
        ids = to_device(list(params.logit_bias), logits.device, torch.int64)
        logits[ids] += to_device(list(params.logit_bias.values()), logits.device, torch.float32)
    if row.banned_ids and row.constraint is None:
        logits.index_fill_(0, to_device(row.banned_ids, logits.device, torch.int64), -torch.inf)


def _penalise(logits: Tensor, row: RowSampling) -> None:
    """Repetition as in CTRL (Keskar et al. 2019), presence and frequency as in OpenAI's API reference."""
    params = row.params
    if params.repetition_penalty != 1.0:
        seen = to_device(np.unique(row.token_ids), logits.device, torch.int64)
        values, penalty = logits[seen], params.repetition_penalty
        logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
    generated, counts = np.unique(row.token_ids[row.num_prompt_tokens :], return_counts=True)
    if len(generated) and (params.presence_penalty or params.frequency_penalty):
        ids = to_device(generated, logits.device, torch.int64)
        times = to_device(counts, logits.device, logits.dtype)
        logits[ids] -= params.presence_penalty + params.frequency_penalty * times


def _put_random(
    tokens: Tensor, logits: Tensor, rows: Sequence[RowSampling], positions: Positions, random: list[int]
) -> None:
    """Draw for the rows `random` into `tokens`."""
    drawn = _draw_random(_some_rows(logits, random), [rows[i] for i in random], positions()[random].tolist())
    if len(random) == len(rows):
        tokens.copy_(drawn)
    else:
        tokens.index_copy_(0, to_device(random, tokens.device, torch.int64), drawn)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return to_device(values, like.device, torch.float32).unsqueeze(1)


def _draw_random(logits: Tensor, rows: Sequence[RowSampling], positions: Sequence[int]) -> Tensor:
    """[R, V] to [R]: one draw a row from the filtered distribution."""
    params = [row.params for row in rows]
    # The largest logit first becomes 0: a tiny temperature then overflows to -inf, never to NaN.
    shifted = logits - logits.amax(-1, keepdim=True)
    probs = shifted.div_(_column([p.temperature for p in params], logits)).softmax(-1)  # [R, V]
    floor = _column([p.min_p for p in params], logits) * probs.amax(-1, keepdim=True)  # [R, 1]
    limited = [i for i, p in enumerate(params) if p.top_p < 1 or p.top_k > 0]
    if limited:
        cut = _cut(
            _some_rows(probs, limited),
            [params[i].top_k for i in limited],
            [params[i].top_p for i in limited],
        )
        own = to_device(limited, logits.device, torch.int64)
        floor.index_copy_(0, own, torch.maximum(floor.index_select(0, own), cut))
    probs.masked_fill_(probs < floor, 0.0)
    draws = uniforms([p.seed for p in params], [row.choice for row in rows], positions)
    cumulative = probs.double().cumsum(-1)  # [R, V]
    target = to_device(draws, logits.device, torch.float64).unsqueeze(1) * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, target, right=True).squeeze(1)
    return tokens.clamp_(max=logits.shape[1] - 1)


def _cut(probs: Tensor, top_k: list[int], top_p: list[float]) -> Tensor:
    """[R, V] to [R, 1]: the probability of the last token that top_k and top_p keep.

    top_p is of what top_k kept. Tokens that tie with the last one are kept as well, so that the result
    does not depend on how a sort orders equals.
    """
    vocab_size = probs.shape[1]
    if support.has_kernels(probs.device.type):
        return _cut_by_kernel(probs, top_k, top_p)
    size = min(_FIRST_TOP, vocab_size) if probs.is_cpu else vocab_size  # to look at `is_short` is to wait
    while True:
        best = probs.topk(size, dim=-1).values  # [R, size]
        last_k = to_device([min(k or vocab_size, size) - 1 for k in top_k], probs.device, torch.int64)
        rank = torch.arange(size, device=probs.device)
        kept = best.double().masked_fill(rank > last_k.unsqueeze(1), 0.0)
        mass = kept.cumsum(-1)
        whole = torch.where(_column([float(bool(k)) for k in top_k], probs) > 0, mass[:, -1:], 1.0)
        goal = to_device(top_p, probs.device, torch.float64).unsqueeze(1) * whole
        if size == vocab_size:
            break
        is_short = ((mass[:, -1:] < goal) & (rank[-1] <= last_k).unsqueeze(1)).any()
        if not is_short and max(top_k) <= size:
            break
        size = vocab_size
    last_p = (mass < goal).sum(-1)  # index of the token with which the mass reaches the goal
    return best.gather(1, torch.minimum(last_p, last_k).unsqueeze(1))


def _cut_by_kernel(probs: Tensor, top_k: list[int], top_p: list[float]) -> Tensor:
    from engines.gpu.cut import cut

    sizes = to_device([k or probs.shape[1] for k in top_k], probs.device, torch.int32)
    return cut(probs.contiguous(), sizes, to_device(top_p, probs.device, torch.float32))


def _log_softmax(logits: Tensor, asked: list[int]) -> Tensor:
    """[L, V] to [A, V], of the rows that asked."""
    return _some_rows(logits, asked).log_softmax(-1)


def _logprobs(
    raw: Tensor, asked: list[int], rows: Sequence[RowSampling], tokens: Tensor, some: list[int]
) -> _Logprobs:
    """Of the drawn (or target) token and of the likeliest, for `some` of the rows that asked."""
    raw = _some_rows(raw, np.searchsorted(asked, some).tolist())
    widths = {i: rows[i].params.logprobs or 0 for i in some}
    top = raw.topk(min(max(widths.values()), raw.shape[1]), dim=-1)
    chosen = _some_rows(tokens, some).clamp(min=0)  # a row that only checks has none
    own = raw.gather(1, chosen.unsqueeze(1)).squeeze(1)
    return _Logprobs(widths, Arriving(own), Arriving(top.values), Arriving(top.indices))


@dataclass(frozen=True, slots=True, eq=False)
class _Logprobs:
    """Of some rows, on their way: of the own token, and of so many others as each row's width."""

    widths: dict[int, int]
    own: Arriving
    values: Arriving
    ids: Arriving

    def result(self, errors: Container[int]) -> dict[int, TokenLogprob]:
        """Of those that are not in error."""
        own, values, ids = (part.get().tolist() for part in (self.own, self.values, self.ids))
        result = {}
        for place, (i, k) in enumerate(self.widths.items()):
            if i not in errors:
                pairs = list(zip(ids[place][:k], values[place][:k], strict=True))
                result[i] = TokenLogprob(own[place], pairs)
        return result
