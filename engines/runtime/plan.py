"""What one step does, as flat arrays: decided by the leader, executed by every rank, never pickled.

T = tokens of the step, S = sequences in it, L = rows whose logits are needed, W = widest block table.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from engines.runtime.grammar import Constraint
from engines.wire import RequestError, SamplingParams, TokenLogprob

Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]

LAST_SAMPLED = -1  # an input id: what this sequence's slot sampled last, known on the device only


class StepKind(IntEnum):
    RUN = 0
    IDLE = 1


class RowUse(IntEnum):
    """What the logits of a row are for."""

    SAMPLE = 0
    PROMPT_LOGPROBS = 1
    VERIFY = 2  # score a drafted token
    CHECK = 3  # only that it is finite: the last token of a chunk that samples nothing
    POOL = 4  # the same, and hidden states are wanted


class RowSampling(msgspec.Struct, frozen=True, eq=False):
    """How to treat one row of logits. Stays on rank 0: not packed, not broadcast.

    Where the row is, the plan says: a sequence that draws all its tokens alike has one of these for all.
    `token_ids` is the whole history (prompt and generated) when penalties need it, else empty; `banned_ids`
    may not be drawn (end tokens before min_tokens), unless `constraint`, its grammar, leaves nothing else.
    `target_id`: the prompt token whose log-probability is wanted (PROMPT_LOGPROBS), the draft (VERIFY: the
    row is drawn as if there were none, and the scheduler compares), else -1. `num_pooled`: the hidden states
    of how many tokens are summed, this row's the last of them (POOL).
    """

    params: SamplingParams
    choice: int = 0
    num_prompt_tokens: int = 0
    token_ids: Int32 = msgspec.field(default_factory=lambda: np.empty(0, np.int32))
    banned_ids: tuple[int, ...] = ()
    target_id: int = -1
    constraint: Constraint | None = None
    num_pooled: int = 0


_ARRAYS = (
    "input_ids",
    "positions",
    "slot_mapping",
    "query_start",
    "context_lens",
    "slots",
    "logit_rows",
    "row_use",
    "block_tables",
)
_HEADER = struct.Struct("<4i")  # kind, T, S, L; W follows from the length


@dataclass(frozen=True, slots=True, eq=False)
class StepPlan:
    """One step.

    Sequence s owns tokens query_start[s] .. query_start[s + 1]; its K/V is `context_lens[s]` long once
    they are written; block_tables[s] names its blocks in order (padded with its first). `slot_mapping[t]` is
    block * block_size + offset, where token t's K/V goes. `slots[s]` is where device state of sequence s
    lives, stable from admission until it leaves. `logit_rows` index into T, ascending.
    """

    kind: StepKind
    input_ids: Int32  # [T]
    positions: Int32  # [T]
    slot_mapping: Int32  # [T]
    query_start: Int32  # [S + 1]
    context_lens: Int32  # [S]
    slots: Int32  # [S]
    logit_rows: Int32  # [L]
    row_use: Int32  # [L]
    block_tables: Int32  # [S, W]
    sampling: tuple[RowSampling, ...] = ()  # [L], rank 0 only
    tag: object = None  # the scheduler's own note on the plan; rank 0 only

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def num_seqs(self) -> int:
        return len(self.context_lens)

    @property
    def has_a_row_for_each_token(self) -> bool:
        """Whether `logit_rows` is 0 .. T: all decode. Else a token may have two rows, or none."""
        num_tokens = self.num_tokens
        return len(self.logit_rows) == num_tokens and not np.count_nonzero(
            self.logit_rows != np.arange(num_tokens, dtype=np.int32)
        )

    @property
    def reads_all(self) -> bool:
        """Whether hidden states of tokens that are not in `logit_rows` may be read."""
        return bool(np.count_nonzero(self.row_use == RowUse.POOL))

    @property
    def drawn_positions(self) -> Int32:
        """[L]: of the token that each row draws, counted from its sequence's first."""
        return self.positions[self.logit_rows] + np.int32(1)

    def sequences_of(self, tokens: NDArray[np.integer]) -> NDArray[np.integer]:
        """To which sequence each of these tokens belongs: indices into T to indices into S."""
        if self.num_tokens == self.num_seqs:
            return tokens
        return np.searchsorted(self.query_start, tokens, side="right") - 1

    def part(self, start: int, stop: int) -> StepPlan:
        """Of the sequences `start` to `stop` only: what they compute is the same. Rank 0 only."""
        first, last = int(self.query_start[start]), int(self.query_start[stop])
        rows = slice(*np.searchsorted(self.logit_rows, [first, last]).tolist())
        return StepPlan(
            kind=self.kind,
            input_ids=self.input_ids[first:last],
            positions=self.positions[first:last],
            slot_mapping=self.slot_mapping[first:last],
            query_start=self.query_start[start : stop + 1] - first,
            context_lens=self.context_lens[start:stop],
            slots=self.slots[start:stop],
            logit_rows=self.logit_rows[rows] - first,
            row_use=self.row_use[rows],
            block_tables=self.block_tables[start:stop],
            sampling=self.sampling[rows],
        )

    def pack(self) -> bytes:
        """The arrays as bytes, little-endian int32, for `unpack` on another rank."""
        header = _HEADER.pack(self.kind, self.num_tokens, self.num_seqs, len(self.logit_rows))
        return header + b"".join(getattr(self, name).tobytes() for name in _ARRAYS)

    @classmethod
    def unpack(cls, data: bytes) -> StepPlan:
        """The plan that `pack` gave, without `sampling` and `tag`. The arrays are views of `data`."""
        kind, t, s, n = _HEADER.unpack_from(data)
        flat = np.frombuffer(data, np.int32, offset=_HEADER.size)
        sizes = (t, t, t, s + 1, s, s, n, n)
        *parts, tables = np.split(flat, np.cumsum(sizes))
        tables = tables.reshape(s, len(tables) // s if s else 0)
        arrays: dict[str, Any] = dict(zip(_ARRAYS, [*parts, tables], strict=True))
        return cls(kind=StepKind(kind), **arrays)

    @classmethod
    def empty(cls, kind: StepKind) -> StepPlan:
        """A plan without work: nothing can run now. It is not sent to anybody."""
        none = np.empty(0, np.int32)
        return cls(
            kind, none, none, none, np.zeros(1, np.int32), none, none, none, none, np.empty((0, 0), np.int32)
        )


@dataclass(frozen=True, slots=True)
class StepResult:
    """What the rows of a plan gave, in the order of `plan.logit_rows`.

    `errors` maps a row to why its own work failed (a penalty, a bias, a grammar, logits that are NaN): that
    sequence ends, its batch-mates go on, and its token id is -1.
    """

    token_ids: Int32  # [L]; the drawn token (SAMPLE, VERIFY), the target for PROMPT_LOGPROBS, else -1
    logprobs: dict[int, TokenLogprob] = field(default_factory=dict)  # row -> value, for rows that asked
    errors: dict[int, RequestError] = field(default_factory=dict)
    pooled: dict[int, Float32] = field(default_factory=dict)  # row -> sum of hidden states [H], for POOL
