"""Logits to tokens, on rank 0. Greedy rows cost one argmax; the others share vectorised filters.

Order: penalties, bias, bans, grammars; then temperature, top_k, top_p, min_p; then one draw by inverse CDF in
vocabulary order. Log-probabilities are of the model's own distribution, before all of that.

A row harms no other: what raises for many rows at once is done again row by row, and a row whose largest
logit is not a number (anything that is not finite in a sequence's K/V makes its logits so) is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from engines.runtime.faults import failed
from engines.runtime.grammar import token_masks
from engines.runtime.plan import Int32, RowSampling, RowUse, StepResult
from engines.runtime.random import uniforms
from engines.wire import RequestError, TokenLogprob

Positions = Callable[[], Int32]
_FIRST_TOP = 1024
"""How many candidates to sort before giving up on a short list: top_p rarely needs more."""


def sample(
    logits: Tensor, rows: Sequence[RowSampling], row_use: Sequence[int], positions: Positions
) -> StepResult:
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
    tokens = _likeliest(logits, errors)
    random = [i for i in drawn if rows[i].params.temperature > 0 and i not in errors]
    _guarded(random, lambda some: _put_random(tokens, logits, rows, positions, some), "sampling", errors)
    if len(drawn) < len(rows):
        for i, row in enumerate(rows):
            if row_use[i] not in _DRAWN:
                tokens[i] = row.target_id
    logprobs: dict[int, TokenLogprob] = {}
    unharmed = [i for i in asked if i not in errors]
    _guarded(
        unharmed, lambda some: logprobs.update(_logprobs(raw, asked, rows, tokens, some)), "logprobs", errors
    )
    if errors:
        tokens[list(errors)] = -1
    return StepResult(tokens.astype(np.int32), logprobs, errors)


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


def _likeliest(logits: Tensor, errors: dict[int, RequestError]) -> np.ndarray:
    """[L, V] to [L]. A maximum is NaN where anything is: that row is in error."""
    if logits.is_cpu:  # where numpy is 12 to 20 times as fast as torch
        values = logits.numpy()
        tokens: np.ndarray = values.argmax(-1)
        is_finite = np.isfinite(values[np.arange(len(tokens)), tokens])
    else:
        largest, best = logits.max(-1)
        tokens, is_finite = best.cpu().numpy(), largest.isfinite().cpu().numpy()
    if np.count_nonzero(is_finite) < len(tokens):
        for i in np.flatnonzero(~is_finite).tolist():
            tokens[i] = -1
            errors.setdefault(i, RequestError("internal", "the model gave logits that are not finite"))
    return tokens


def _is_adjusted(row: RowSampling) -> bool:
    return bool(len(row.token_ids) or row.params.logit_bias or row.banned_ids)


def _constrain(logits: Tensor, rows: Sequence[RowSampling], some: list[int]) -> None:
    """-inf where the grammars of `some` rows do not go on. On a GPU the masks are made while it computes."""
    constraints = [(own, rows[i].banned_ids) for i in some if (own := rows[i].constraint) is not None]
    vocab_size = logits.shape[1]
    masks = token_masks(constraints, vocab_size)
    bits = np.unpackbits(~masks.view(np.uint8), axis=1, count=vocab_size, bitorder="little")
    is_out = torch.from_numpy(bits).view(torch.bool).to(logits.device)  # [R, V]
    if len(some) == len(rows):
        logits.masked_fill_(is_out, -torch.inf)
    else:
        logits[some] = logits[some].masked_fill_(is_out, -torch.inf)


def _adjust_row(logits: Tensor, row: RowSampling) -> None:
    params = row.params
    if len(row.token_ids):
        _penalise(logits, row)
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias), device=logits.device)
        logits[ids] += torch.tensor(list(params.logit_bias.values()), device=logits.device)
    if row.banned_ids and row.constraint is None:
        logits[torch.tensor(row.banned_ids, device=logits.device)] = -torch.inf


def _penalise(logits: Tensor, row: RowSampling) -> None:
    """Repetition as in CTRL (Keskar et al. 2019), presence and frequency as in OpenAI's API reference."""
    params = row.params
    if params.repetition_penalty != 1.0:
        seen = torch.from_numpy(np.unique(row.token_ids).astype(np.int64)).to(logits.device)
        values, penalty = logits[seen], params.repetition_penalty
        logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
    generated, counts = np.unique(row.token_ids[row.num_prompt_tokens :], return_counts=True)
    if len(generated) and (params.presence_penalty or params.frequency_penalty):
        ids = torch.from_numpy(generated.astype(np.int64)).to(logits.device)
        times = torch.from_numpy(counts).to(logits.device, logits.dtype)
        logits[ids] -= params.presence_penalty + params.frequency_penalty * times


def _put_random(
    tokens: np.ndarray,
    logits: Tensor,
    rows: Sequence[RowSampling],
    positions: Positions,
    random: list[int],
) -> None:
    """Draw for the rows `random` into `tokens`."""
    chosen = logits if len(random) == len(rows) else logits[random]
    drawn = _draw_random(chosen, [rows[i] for i in random], positions()[random].tolist())
    tokens[random] = drawn.cpu().numpy()


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device).unsqueeze(1)


def _draw_random(logits: Tensor, rows: Sequence[RowSampling], positions: Sequence[int]) -> Tensor:
    """[R, V] to [R]: one draw a row from the filtered distribution."""
    params = [row.params for row in rows]
    # The largest logit first becomes 0: a tiny temperature then overflows to -inf, never to NaN.
    shifted = logits - logits.amax(-1, keepdim=True)
    probs = shifted.div_(_column([p.temperature for p in params], logits)).softmax(-1)  # [R, V]
    floor = _column([p.min_p for p in params], logits) * probs.amax(-1, keepdim=True)  # [R, 1]
    limited = [i for i, p in enumerate(params) if p.top_p < 1 or p.top_k > 0]
    if limited:
        cut = _cut(probs[limited], [params[i].top_k for i in limited], [params[i].top_p for i in limited])
        floor[limited] = torch.maximum(floor[limited], cut)
    probs.masked_fill_(probs < floor, 0.0)
    draws = uniforms([p.seed for p in params], [row.choice for row in rows], positions)
    cumulative = probs.double().cumsum(-1)  # [R, V]
    target = torch.from_numpy(draws).to(logits.device).unsqueeze(1) * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, target, right=True).squeeze(1)
    return tokens.clamp_(max=logits.shape[1] - 1)


def _cut(probs: Tensor, top_k: list[int], top_p: list[float]) -> Tensor:
    """[R, V] to [R, 1]: the probability of the last token that top_k and top_p keep.

    top_p is of what top_k kept. Tokens that tie with the last one are kept as well, so that the result
    does not depend on how a sort orders equals.
    """
    size = min(_FIRST_TOP, probs.shape[1])
    while True:
        best = probs.topk(size, dim=-1).values  # [R, size]
        last_k = torch.tensor([min(k or probs.shape[1], size) for k in top_k], device=probs.device) - 1
        rank = torch.arange(size, device=probs.device)
        kept = best.double().masked_fill(rank > last_k.unsqueeze(1), 0.0)
        mass = kept.cumsum(-1)
        whole = torch.where(_column([float(bool(k)) for k in top_k], probs) > 0, mass[:, -1:], 1.0)
        goal = torch.tensor(top_p, dtype=torch.float64, device=probs.device).unsqueeze(1) * whole
        is_short = ((mass[:, -1:] < goal) & (rank[-1] <= last_k).unsqueeze(1)).any() | any(
            k > size for k in top_k
        )
        if size == probs.shape[1] or not is_short:
            break
        size = probs.shape[1]
    last_p = (mass < goal).sum(-1)  # index of the token with which the mass reaches the goal
    return best.gather(1, torch.minimum(last_p, last_k).unsqueeze(1))


def _log_softmax(logits: Tensor, asked: list[int]) -> Tensor:
    """[L, V] to [A, V], of the rows that asked."""
    return (logits if len(asked) == len(logits) else logits[asked]).log_softmax(-1)


def _logprobs(
    raw: Tensor, asked: list[int], rows: Sequence[RowSampling], tokens: np.ndarray, some: list[int]
) -> dict[int, TokenLogprob]:
    """Of the drawn (or target) token and of the likeliest, for `some` of the rows that asked."""
    if len(some) < len(asked):
        raw = raw[np.searchsorted(asked, some)]
    width = min(max(rows[i].params.logprobs or 0 for i in some), raw.shape[1])
    chosen = raw.gather(1, torch.from_numpy(tokens[some]).to(raw.device).long().unsqueeze(1))
    top = raw.topk(width, dim=-1)
    values, ids = top.values.tolist(), top.indices.tolist()
    own = chosen.squeeze(1).tolist()
    result = {}
    for place, i in enumerate(some):
        k = rows[i].params.logprobs or 0
        pairs = list(zip(ids[place][:k], values[place][:k], strict=True))
        result[i] = TokenLogprob(own[place], pairs)
    return result
