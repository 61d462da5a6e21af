"""One request inside the runtime: its tokens, how much of their K/V exists, and where that lies."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np

from engines.runtime.grammar import Constraint
from engines.runtime.plan import Float32, Int32, RowSampling
from engines.runtime.prompt_lookup import Trust
from engines.wire import Generate, RequestError, TokenLogprob

_DIGEST_BYTES = 32


def root_hash(salt: bytes, group: str) -> bytes:
    """What a chain of block hashes starts from. Only equal salts and groups can share blocks."""
    return blake2b(
        len(salt).to_bytes(4, "little") + salt + group.encode(), digest_size=_DIGEST_BYTES
    ).digest()


def chain_hash(parent: bytes, token_ids: list[int]) -> bytes:
    """The hash of a full block: of its own tokens and, through `parent`, of all tokens before them."""
    return blake2b(parent + array("i", token_ids).tobytes(), digest_size=_DIGEST_BYTES).digest()


@dataclass(slots=True, eq=False)
class Sequence:
    """The scheduler's record of one Generate.

    token_ids = prompt + resumed + generated, as far as they are known. `num_computed_tokens` counts
    those whose K/V exists once every plan made so far has run: plans run in order, so a later plan may
    rely on it. `num_unknown_tokens` counts tokens that plans in flight will sample.
    """

    request: Generate
    arrival: int
    token_ids: list[int]
    max_len: int  # tokens, prompt included, after which it ends with "length"
    stop_ids: frozenset[int]
    hash_root: bytes | None  # None: it shares no blocks
    constraint: Constraint | None = None  # its grammar; it may not run ahead of what it sampled
    num_computed_tokens: int = 0
    num_unknown_tokens: int = 0
    num_plans_in_flight: int = 0
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    num_hashed_blocks: int = 0  # of block_table, offered to the prefix cache (or read from it)
    slot: int = -1
    is_long: bool = False  # what it had to compute when it was admitted is more than a short prompt
    is_finished: bool = False
    has_reported: bool = False  # what is said once; of a resumed one the group before has said it
    num_cached_tokens: int | None = None  # prompt tokens read from the cache when first admitted
    error: RequestError | None = None  # its own work failed: it ends with its next result
    num_scored: int | None = None  # prompt tokens whose log-probability it has had; None: not asked for
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)  # of them, those not sent yet
    pooled: Float32 | None = None  # [H]: the sum of the hidden states that are pooled, so far
    draws_alike: bool = field(init=False)  # `sampling` is how it draws each of its tokens
    sampling: RowSampling = field(init=False)
    trust: Trust = field(default_factory=Trust)  # in guesses of its tokens
    _history: array[int] = field(default_factory=lambda: array("i"))

    def __post_init__(self) -> None:
        request = self.request
        self.draws_alike = not (self.needs_history or self.constraint or request.min_tokens)
        self.sampling = RowSampling(request.sampling, request.choice, len(request.prompt_ids))

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) + self.num_unknown_tokens

    @property
    def num_pending(self) -> int:
        return len(self.token_ids) + self.num_unknown_tokens - self.num_computed_tokens

    @property
    def is_ready(self) -> bool:
        """Whether it can start: its grammar is compiled."""
        return self.constraint is None or self.constraint.is_ready

    @property
    def needs_history(self) -> bool:
        """Whether a penalty makes its draws depend on all tokens before, not only through the model."""
        params = self.request.sampling
        return bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0)

    @property
    def pools_all(self) -> bool:
        """Whether each of its tokens' hidden state is needed, so that the prefix cache saves nothing."""
        pooling = self.request.pooling
        return pooling is not None and pooling.method == "mean"

    @property
    def num_shareable_tokens(self) -> int:
        """How many tokens' K/V may come from the prefix cache: none whose prompt log-probability, or hidden
        state, is still to be had. (The last one's logits are needed in any case: it is computed again.)"""
        if self.pools_all:
            return 0
        num_known = len(self.token_ids)
        if self.num_scored is None or self.num_scored >= self.num_prompt_tokens:
            return num_known
        return min(num_known, self.num_scored - 1)

    def history(self, drafts: tuple[int, ...]) -> Int32:
        """Its known tokens and these drafts, for penalties. Only new tokens are converted each time."""
        self._history.extend(self.token_ids[len(self._history) :])
        known = np.array(self._history, np.int32)
        return np.concatenate([known, np.array(drafts, np.int32)]) if drafts else known

    def hash_of_block(self, index: int, block_size: int) -> bytes:
        """The chained hash of its block `index`, all of whose tokens must be known."""
        assert self.hash_root is not None, "it shares no blocks"
        hashes = self.block_hashes
        while len(hashes) <= index:
            start = len(hashes) * block_size
            parent = hashes[-1] if hashes else self.hash_root
            hashes.append(chain_hash(parent, self.token_ids[start : start + block_size]))
        return hashes[index]
