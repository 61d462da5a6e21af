"""Which sequences run in the next step, and what became of those of the last: continuous batching.

One rule, no prefill and decode phases: a sequence has num_pending = known tokens - computed tokens, a
step computes some of them, and a token is sampled when none is left.
"""

from __future__ import annotations

import logging
from bisect import insort
from collections import OrderedDict
from collections.abc import Iterable
from itertools import islice
from typing import Protocol

from engines.runtime.block_tables import BlockTables
from engines.runtime.blocks import BlockPool, Unaccounted, require
from engines.runtime.chunk import Chunk
from engines.runtime.faults import failed
from engines.runtime.grammar import Grammars
from engines.runtime.intake import Intake
from engines.runtime.outcome import end_with, has_ended, take_result
from engines.runtime.pace import Pace
from engines.runtime.plan import StepKind, StepPlan, StepResult
from engines.runtime.plan_builder import PlanBuilder
from engines.runtime.sequence import Sequence
from engines.wire import Generate, RequestError, Stats, TokenDelta

log = logging.getLogger("sluice.engine")


class Scheduler(Protocol):
    """A batching policy. It holds no tensor, socket or clock.

    schedule() gives IDLE when nothing can be started: no work, or all of it waits for a plan in flight.
    Every plan that is not IDLE must come back through update(), in the order it was given out.
    """

    @property
    def has_work(self) -> bool:
        """Whether any sequence is queued or running, or a plan is in flight."""

    def add(self, request: Generate) -> list[TokenDelta]:
        """Queue it. A delta is its end: it was refused, or there was nothing to generate."""

    def abort(self, id: str) -> None:
        """Drop it and free its blocks now, even those that a plan in flight still writes."""

    def schedule(self) -> StepPlan: ...

    def update(self, plan: StepPlan, result: StepResult) -> list[TokenDelta]: ...

    def took(self, plan: StepPlan, seconds: float) -> None:
        """How long that plan's step lasted, from being scheduled until its tokens were sent."""

    def audit(self) -> None:
        """While there is no work: check the accounts of the K/V and put right what is wrong. Nobody holds
        anything then, so all of it can be taken back, which harms less than a leak or a restart."""

    def stats(self, num_steps: int) -> Stats:
        """Counters since start and gauges now. The leader counts the steps."""


_FEW = 2
"""Running sequences whose guesses cost next to nothing: the weights are read for one token as for several."""


class Drafter(Protocol):
    """Guesses what comes next, for the model to verify several tokens in one step."""

    def draft(self, token_ids: list[int], max_tokens: int) -> list[int]:
        """At most `max_tokens` guesses; may be none."""


class ContinuousScheduler:
    """Continuous batching over paged K/V, first come first served.

    Running sequences go first, oldest first. When blocks run out the youngest is preempted: its blocks
    are freed, it returns to the front of the queue and is computed again (mostly from the prefix cache).
    Then the queue is admitted in order; others may pass only a sequence whose sibling (same `group`) is just
    computing the prompt they share, or whose grammar is being compiled.

    `max_plans_in_flight` plans may be out at once. Without `run_ahead` their sequences are disjoint, and each
    plan takes its share of them (micro-batches). With it a sequence that only lacks its last sampled token is
    scheduled again, with LAST_SAMPLED for that token; what it sampled beyond its end is dropped.

    While sequences decode, `pace` says how many tokens of long prompts a plan takes beside them. Short ones
    may pass those that wait.

    Blocks are freed at once even if a plan in flight writes them: plans run in order, so a later owner's
    writes come after, and it reads only what it wrote.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        eos_token_ids: Iterable[int],
        prefix_cache: bool = True,
        max_plans_in_flight: int = 1,
        run_ahead: bool = False,
        drafter: Drafter | None = None,
        max_draft_tokens: int = 4,
        pace: Pace | None = None,
        vocab_size: int = 2**31,
        grammars: Grammars | None = None,
    ) -> None:
        assert min(block_size, max_num_seqs, max_num_batched_tokens, max_plans_in_flight) > 0
        self.block_size = block_size
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = min(max_model_len, num_blocks * block_size)  # so that any sequence fits alone
        self.max_plans_in_flight = max_plans_in_flight
        self._intake = Intake(self.max_model_len, eos_token_ids, prefix_cache, vocab_size, grammars)
        self._prefix_cache = prefix_cache
        self._run_ahead = run_ahead
        self._drafter = drafter
        self._max_draft_tokens = max_draft_tokens
        self._pace = pace
        self._short_prompt = 0 if pace is None else pace.short_prompt
        self._prompt_budget = 0  # of the plan that is being made
        self._long_budget = 0  # of that, what may go to long prompts
        self._pool = BlockPool(num_blocks)
        self._tables = BlockTables(max_num_seqs, -(-self.max_model_len // block_size), block_size)
        self._plans = PlanBuilder(self._tables, max_plans_in_flight)
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))
        self._sequences: dict[str, Sequence] = {}  # queued and running
        self._queue: OrderedDict[str, Sequence] = OrderedDict()
        self._running: list[Sequence] = []  # oldest first
        self._prompt_leaders: dict[str, Sequence] = {}  # group -> who computes the shared prompt
        self._num_plans_in_flight = 0
        self._num_account_faults = 0
        self._num_preemptions = 0
        self._num_prefix_queries = 0
        self._num_prefix_hits = 0
        self._num_prompt_tokens = 0
        self._num_generated_tokens = 0
        self._num_drafted_tokens = 0
        self._num_accepted_tokens = 0

    # ------------------------------------------------------------------ requests in and out

    @property
    def has_work(self) -> bool:
        return bool(self._sequences) or self._num_plans_in_flight > 0

    def add(self, request: Generate) -> list[TokenDelta]:
        if request.id in self._sequences:
            message = f"a sequence with the id {request.id!r} is already running"
            return [TokenDelta(id=request.id, error=RequestError("invalid_request", message))]
        taken = self._intake.take(request)
        if isinstance(taken, TokenDelta):
            return [taken]
        self._sequences[taken.id] = self._queue[taken.id] = taken
        return []

    def abort(self, id: str) -> None:
        sequence = self._sequences.get(id)
        if sequence is not None:
            self._remove(sequence)

    def stats(self, num_steps: int) -> Stats:
        return Stats(
            num_steps=num_steps,
            num_running=len(self._running),
            num_waiting=len(self._queue),
            num_blocks_used=self._pool.num_used,
            num_blocks_cached=self._pool.num_cached,
            num_blocks_free=self._pool.num_free,
            num_account_faults=self._num_account_faults,
            num_preemptions=self._num_preemptions,
            num_prefix_queries=self._num_prefix_queries,
            num_prefix_hits=self._num_prefix_hits,
            num_prompt_tokens=self._num_prompt_tokens,
            num_generated_tokens=self._num_generated_tokens,
            num_drafted_tokens=self._num_drafted_tokens,
            num_accepted_tokens=self._num_accepted_tokens,
        )

    def check(self) -> None:
        """Raise Unaccounted unless every block, slot and sequence is accounted for and no block is shared by
        sequences that may not share. For tests, after every step; in production `audit` calls it."""
        self._pool.check([sequence.block_table for sequence in self._running])
        slots = sorted([sequence.slot for sequence in self._running] + self._free_slots)
        require(slots == list(range(self.max_num_seqs)), "slots were lost or given twice")
        known = {*self._queue, *(sequence.id for sequence in self._running)}
        require(known == set(self._sequences), "a sequence is neither queued nor running")
        require(
            not any(sequence.block_table for sequence in self._queue.values()), "a queued one holds blocks"
        )
        roots: dict[int, bytes | None] = {}
        for sequence in self._running:
            for block in sequence.block_table:
                is_own = roots.setdefault(block, sequence.hash_root) == sequence.hash_root
                require(is_own, "a block is shared by sequences of different salts")

    def audit(self) -> None:
        assert not self.has_work
        try:
            self.check()
        except Unaccounted as error:
            log.error("K/V accounts are wrong: %s; everything is taken back, the prefix cache emptied", error)
            self._num_account_faults += 1
            self._pool = BlockPool(self._pool.num_blocks)
            self._free_slots = list(range(self.max_num_seqs - 1, -1, -1))

    def _remove(self, sequence: Sequence) -> None:
        """It has ended, however."""
        sequence.is_finished = True
        del self._sequences[sequence.id]
        if self._queue.pop(sequence.id, None) is None:
            self._stop_running(sequence)

    def _stop_running(self, sequence: Sequence) -> None:
        """Take back its blocks and its slot."""
        self._running.remove(sequence)
        self._free_slots.append(sequence.slot)
        self._pool.release(sequence.block_table)
        sequence.block_table = []
        sequence.slot = -1
        self._end_lead(sequence)

    def _end_lead(self, sequence: Sequence) -> None:
        """Its siblings wait for it no longer."""
        group = sequence.request.group
        if group and self._prompt_leaders.get(group) is sequence:
            del self._prompt_leaders[group]

    # ------------------------------------------------------------------ what runs next

    def schedule(self) -> StepPlan:
        chunks: list[Chunk] = []
        if self._num_plans_in_flight < self.max_plans_in_flight and not self._must_wait():
            long_tokens = self._long_prompt_tokens()
            self._fill(chunks, long_tokens)
            if not chunks and not long_tokens:  # those that decode wait for blocks: nobody is delayed
                self._fill(chunks, self.max_num_batched_tokens)
        if not chunks:
            return StepPlan.empty(StepKind.IDLE)
        self._num_plans_in_flight += 1
        return self._plans.build(chunks)

    def _fill(self, chunks: list[Chunk], long_tokens: int) -> None:
        """With what goes into a plan that takes so many tokens of long prompts."""
        self._long_budget = long_tokens
        self._prompt_budget = max(long_tokens, self._short_prompt_tokens())
        budget, may_admit = self._continue_running(chunks)
        if may_admit:
            self._admit(chunks, budget)

    def _long_prompt_tokens(self) -> int:
        if self._pace is None:
            return self.max_num_batched_tokens
        num_decoding = sum(one.num_pending == 1 for one in self._running)
        if not num_decoding:
            return self.max_num_batched_tokens
        return self._pace.prompt_tokens(num_decoding)

    def _short_prompt_tokens(self) -> int:
        """All that a step takes while more of them wait than sequences run: so fewer wait longer."""
        if not self._short_prompt:
            return 0
        short = (one for one in self._queue.values() if len(one.token_ids) <= self._short_prompt)
        more_than_run = next(islice(short, len(self._running), None), None)
        return self._short_prompt if more_than_run is None else self.max_num_batched_tokens

    def _num_tokens_of_chunk(self, sequence: Sequence, budget: int) -> int:
        num_pending = sequence.num_pending
        if num_pending == 1:
            return 1
        most = min(budget, self._prompt_budget, self._long_budget if sequence.is_long else budget)
        return min(num_pending, most)

    def _continue_running(self, chunks: list[Chunk]) -> tuple[int, bool]:
        """Chunks of the running sequences. Returns the budget left, and whether blocks sufficed."""
        budget, may_admit = self.max_num_batched_tokens, True
        max_chunks = self._max_chunks(len(self._running))
        num_preemptions = self._num_preemptions
        index = 0
        while index < len(self._running) and budget > 0 and len(chunks) < max_chunks:
            sequence = self._running[index]
            index += 1
            if sequence.num_plans_in_flight and not self._can_run_ahead(sequence):
                continue
            num_tokens = self._num_tokens_of_chunk(sequence, budget)
            if num_tokens == 0:
                continue
            if not self._make_room(sequence, sequence.num_computed_tokens + num_tokens):
                may_admit = False
                break  # nobody younger runs before it, so that those in flight come back
            budget -= self._start_chunk(chunks, sequence, num_tokens, budget)
        return budget, may_admit and num_preemptions == self._num_preemptions

    def _max_chunks(self, num_candidates: int) -> int:
        """How many sequences one plan takes, so that the others fill the other plans in flight."""
        if self._run_ahead:
            return self.max_num_seqs
        return -(-num_candidates // self.max_plans_in_flight)

    def _can_run_ahead(self, sequence: Sequence) -> bool:
        """Whether one that is in flight already can go into another plan."""
        if not self._run_ahead or sequence.num_pending == 0:
            return False
        if sequence.num_unknown_tokens == 0:
            return True  # the next chunk of its prompt
        if sequence.needs_history or sequence.constraint is not None or self._drafter:
            return False  # what it sampled decides how it samples next
        return sequence.num_tokens < sequence.max_len

    def _must_wait(self) -> bool:
        """Whether a plan without a sequence that is in flight, and cannot run ahead, would have it miss every
        second step."""
        return self._run_ahead and any(
            sequence.num_unknown_tokens
            and sequence.num_tokens < sequence.max_len
            and not self._can_run_ahead(sequence)
            for sequence in self._running
        )

    def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Give it blocks for its first `num_tokens` tokens, if need be those of the youngest.

        False: it has to wait, being the youngest, or for a plan that the youngest is in.
        """
        if num_tokens <= len(sequence.block_table) * self.block_size:
            return True
        num_missing = -(-num_tokens // self.block_size) - len(sequence.block_table)
        while self._pool.num_available < num_missing:
            youngest = self._running[-1]
            if youngest is sequence or youngest.num_plans_in_flight:
                return False
            self._preempt(youngest)
        self._give_blocks(sequence, num_missing)
        return True

    def _give_blocks(self, sequence: Sequence, num_blocks: int) -> None:
        blocks = [self._pool.allocate() for _ in range(num_blocks)]
        self._tables.write(sequence.slot, len(sequence.block_table), blocks)
        sequence.block_table += blocks

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the front of the queue, without blocks. Not while in flight: its results would be lost."""
        assert sequence.num_plans_in_flight == 0
        self._num_preemptions += 1
        self._stop_running(sequence)
        sequence.num_computed_tokens = 0
        self._queue[sequence.id] = sequence
        self._queue.move_to_end(sequence.id, last=False)

    def _start_chunk(self, chunks: list[Chunk], sequence: Sequence, num_tokens: int, budget: int) -> int:
        """Put its next tokens into the plan. Returns how many, drafts included."""
        start, num_known = sequence.num_computed_tokens, sequence.num_tokens
        if num_known - start > 1:
            self._prompt_budget -= num_tokens
            self._long_budget -= num_tokens if sequence.is_long else 0
        samples = start + num_tokens == num_known < sequence.max_len
        is_reread = start < sequence.num_hashed_blocks * self.block_size
        drafts: tuple[int, ...] = ()
        if samples and self._drafter is not None and sequence.constraint is None and not is_reread:
            drafts = self._draft(sequence, budget - num_tokens)
            num_tokens += len(drafts)
        chunks.append(Chunk(sequence, start, num_tokens, samples, drafts, is_reread=is_reread))
        sequence.num_computed_tokens = start + num_tokens
        sequence.num_unknown_tokens += samples
        sequence.num_plans_in_flight += 1
        return num_tokens

    def _draft(self, sequence: Sequence, budget: int) -> tuple[int, ...]:
        """Guesses for which there are tokens, length and blocks, nobody being preempted for them."""
        assert self._drafter is not None
        room = len(sequence.block_table) + self._pool.num_available
        max_tokens = min(
            self._max_draft_tokens,
            budget,
            sequence.max_len - len(sequence.token_ids) - 1,
            room * self.block_size - len(sequence.token_ids),
        )
        if len(self._running) > _FEW:
            max_tokens = min(max_tokens, sequence.trust.num_guesses)
        if max_tokens <= 0:
            return ()
        try:
            drafts = tuple(self._drafter.draft(sequence.token_ids, max_tokens)[:max_tokens])
        except Exception as error:  # over its tokens: its own
            sequence.error = failed("its draft", error)
            return ()
        has_room = self._make_room(sequence, len(sequence.token_ids) + len(drafts))
        assert has_room, "drafts were bounded by the blocks available"
        return drafts

    # ------------------------------------------------------------------ admission

    def _admit(self, chunks: list[Chunk], budget: int) -> None:
        """Start queued sequences in order while tokens, slots and blocks last."""
        max_chunks = self._max_chunks(min(len(self._running) + len(self._queue), self.max_num_seqs))
        admitted: list[str] = []
        for sequence in self._queue.values():
            if min(budget, self._prompt_budget) <= 0 or not self._free_slots or len(chunks) >= max_chunks:
                break
            if not sequence.is_ready:
                continue
            if self._long_budget <= 0 and len(sequence.token_ids) > self._short_prompt:
                continue  # another long one is being read
            prefix = self._find_prefix(sequence)
            if self._waits_for_sibling(sequence, len(prefix)):
                continue
            if not self._fits(sequence, prefix):
                break
            self._start_running(sequence, prefix)
            budget -= self._start_chunk(chunks, sequence, self._num_tokens_of_chunk(sequence, budget), budget)
            admitted.append(sequence.id)
        for id in admitted:
            del self._queue[id]

    def _find_prefix(self, sequence: Sequence) -> list[int]:
        """The blocks from which it can read the K/V of its first tokens, or of all of them."""
        try:
            return self._look_up(sequence)
        except Exception as error:  # over its tokens: its own
            sequence.error = failed("its prefix", error)
            return []

    def _look_up(self, sequence: Sequence) -> list[int]:
        prefix: list[int] = []
        if sequence.hash_root is None:
            return prefix
        num_shareable = min(sequence.num_shareable_tokens, self.max_model_len - 1)
        for index in range(num_shareable // self.block_size):
            block = self._pool.find(sequence.hash_of_block(index, self.block_size))
            if block is None:
                break
            prefix.append(block)
        return prefix

    def _waits_for_sibling(self, sequence: Sequence, num_found: int) -> bool:
        leader = self._prompt_leaders.get(sequence.request.group)
        if leader is None or sequence.num_scored is not None:
            return False
        return num_found < (sequence.num_prompt_tokens - 1) // self.block_size

    def _fits(self, sequence: Sequence, prefix: list[int]) -> bool:
        """Whether there are blocks for all its tokens, and a few to spare for those already running."""
        num_in_use = sum(self._pool.is_used(block) for block in prefix)
        num_taken = self._num_blocks_for(sequence, prefix) - num_in_use
        num_spare = self._pool.num_blocks // 100 if self._running else 0
        return num_taken + num_spare <= self._pool.num_available

    def _num_blocks_for(self, sequence: Sequence, prefix: list[int]) -> int:
        """For its tokens, and for what is computed again of the last one if that is in the prefix."""
        num_blocks = -(-len(sequence.token_ids) // self.block_size)
        return num_blocks + (len(prefix) == num_blocks)

    def _start_running(self, sequence: Sequence, prefix: list[int]) -> None:
        """Give it a slot, the blocks of its prefix, and new ones for all its other tokens."""
        sequence.slot = self._free_slots.pop()
        insort(self._running, sequence, key=lambda s: s.arrival)
        for block in prefix:
            self._pool.share(block)
        sequence.block_table = list(prefix)
        sequence.num_hashed_blocks = len(prefix)
        sequence.num_computed_tokens = min(len(prefix) * self.block_size, len(sequence.token_ids) - 1)
        sequence.is_long = sequence.num_pending > self._short_prompt
        self._tables.write(sequence.slot, 0, prefix)
        self._give_blocks(sequence, self._num_blocks_for(sequence, prefix) - len(prefix))
        self._count_admission(sequence)
        if sequence.request.group:
            self._prompt_leaders.setdefault(sequence.request.group, sequence)

    def _count_admission(self, sequence: Sequence) -> None:
        """Prompt and prefix counters count a sequence once, not again after a preemption."""
        if sequence.num_cached_tokens is not None:
            return
        num_prompt = sequence.num_prompt_tokens
        sequence.num_cached_tokens = min(sequence.num_computed_tokens, num_prompt)
        self._num_prompt_tokens += num_prompt
        if self._prefix_cache and sequence.num_scored is None and not sequence.pools_all:
            self._num_prefix_queries += num_prompt
            self._num_prefix_hits += sequence.num_cached_tokens

    # ------------------------------------------------------------------ what came of it

    def took(self, plan: StepPlan, seconds: float) -> None:
        if self._pace is None:
            return
        num_decoding, num_prompt_tokens = plan.num_seqs, 0
        if plan.num_tokens > plan.num_seqs:
            assert isinstance(plan.tag, list), "not a plan of schedule()"
            without_drafts = [chunk.num_tokens - len(chunk.drafts) for chunk in plan.tag]
            num_decoding = without_drafts.count(1)
            num_prompt_tokens = sum(without_drafts) - num_decoding
        self._pace.took(num_decoding, num_prompt_tokens, seconds)

    def update(self, plan: StepPlan, result: StepResult) -> list[TokenDelta]:
        """Take in what a plan gave: tokens to send, in the plan's order, and ends."""
        chunks = plan.tag
        assert isinstance(chunks, list), "not a plan of schedule()"
        assert self._num_plans_in_flight > 0, "a plan came back twice"
        self._num_plans_in_flight -= 1
        token_ids: list[int] = result.token_ids.tolist()
        deltas = []
        for chunk in chunks:
            sequence = chunk.sequence
            sequence.num_plans_in_flight -= 1
            if sequence.is_finished:
                continue  # aborted, or ended before this plan, which had run ahead, came back
            delta = self._take_result(chunk, token_ids, result)
            if delta is None:
                continue
            deltas.append(delta)
            self._num_generated_tokens += len(delta.token_ids)
            if self._drafter is not None and delta.token_ids:
                num_held = len(delta.token_ids) - 1
                chunk.sequence.trust.drew(len(chunk.drafts), num_held)
                self._num_drafted_tokens += len(chunk.drafts)
                self._num_accepted_tokens += num_held
            if has_ended(delta):
                self._remove(sequence)
        return deltas

    def _take_result(self, chunk: Chunk, token_ids: list[int], result: StepResult) -> TokenDelta | None:
        sequence = chunk.sequence
        delta = take_result(chunk, token_ids, result)
        if delta is not None and delta.error is not None:
            return delta  # others shall not find what it computed
        try:
            self._offer_blocks(sequence, min(chunk.end, len(sequence.token_ids) - chunk.samples))
        except Exception as error:  # over its tokens: its own
            return end_with(sequence, failed("offering its blocks", error))
        return delta

    def _offer_blocks(self, sequence: Sequence, num_computed: int) -> None:
        """Let others find its full blocks up to there, now that they have been computed and are finite."""
        num_full = num_computed // self.block_size
        if num_full > sequence.num_hashed_blocks and sequence.hash_root is not None:
            for index in range(sequence.num_hashed_blocks, num_full):
                block_hash = sequence.hash_of_block(index, self.block_size)
                self._pool.register(sequence.block_table[index], block_hash)
                sequence.num_hashed_blocks = index + 1
        if sequence.request.group and num_computed >= sequence.num_prompt_tokens:
            self._end_lead(sequence)
