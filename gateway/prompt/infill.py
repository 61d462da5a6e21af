"""Fill-in-the-middle: the tokens with which code models are asked for what stands between two texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from gateway.prompt.tokenizer import Tokenizer

_SPELLINGS: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    # what stands before prefix, suffix and middle; and what ends it besides the model's own end tokens
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", ("<|endoftext|>", "<|fim_pad|>", "<|file_sep|>")),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>", ("<|endoftext|>", "<fim_pad>", "<file_sep>")),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>", ("<|endoftext|>", "<fim-pad>")),
    ("▁<PRE>", "▁<SUF>", "▁<MID>", ("▁<EOT>",)),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>", ()),
)
"""Of Qwen and CodeGemma, StarCoder and Granite, SantaCoder, CodeLlama, DeepSeek."""


class Infill(NamedTuple):
    """A model's tokens for it, all in the order prefix, suffix, middle."""

    prefix_id: int
    suffix_id: int
    middle_id: int
    end_ids: tuple[int, ...]

    def prompt(self, lead: Sequence[int], prefix: Sequence[int], suffix: Sequence[int]) -> list[int]:
        """After which the middle comes. `lead`: what the model puts before every text."""
        return [*lead, self.prefix_id, *prefix, self.suffix_id, *suffix, self.middle_id]


def infill_of(tokenizer: Tokenizer) -> Infill | None:
    """None: the model was not made for it, its tokenizer has no such tokens."""
    for before, between, after, ends in _SPELLINGS:
        prefix_id, suffix_id, middle_id = (tokenizer.id_of(name) for name in (before, between, after))
        if prefix_id is not None and suffix_id is not None and middle_id is not None:
            end_ids = (tokenizer.id_of(end) for end in ends)
            return Infill(prefix_id, suffix_id, middle_id, tuple(id for id in end_ids if id is not None))
    return None
