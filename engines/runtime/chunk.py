"""What one plan computes of one sequence."""

from __future__ import annotations

from dataclasses import dataclass

from engines.runtime.sequence import Sequence


@dataclass(slots=True, eq=False)
class Chunk:
    """The consecutive tokens of one sequence that one plan computes, and the rows of logits it wants: first
    those of `num_prompt_rows` prompt positions; then, if it `samples`, one for each draft and one more, else
    one that tells whether what it computed is finite.
    """

    sequence: Sequence
    start: int  # position of its first token
    num_tokens: int  # drafts included
    samples: bool
    drafts: tuple[int, ...] = ()
    first_row: int = 0
    num_prompt_rows: int = 0
    is_reread: bool = False
    """It is one token, whose K/V is in a shared block already: what is computed again of that goes where the
    next token's will overwrite it."""

    @property
    def end(self) -> int:
        return self.start + self.num_tokens

    @property
    def decodes_alike(self) -> bool:
        """Whether it is one token, after which the next is drawn as every one of its sequence is."""
        is_next = self.num_tokens == 1 and not self.is_reread
        return is_next and self.samples and self.sequence.draws_alike

    @property
    def num_rows(self) -> int:
        return self.num_prompt_rows + len(self.drafts) + 1

    @property
    def num_pooled(self) -> int:
        """Of how many of its tokens, the last ones, the hidden states are pooled."""
        pooling = self.sequence.request.pooling
        if pooling is None:
            return 0
        is_last = self.end == self.sequence.num_prompt_tokens
        return self.num_tokens if pooling.method == "mean" else int(is_last)
