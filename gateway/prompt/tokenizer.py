"""Text to token ids and back, with the model's own tokenizer.json; nothing of transformers.

Ordinary text gets exactly the ids that Hugging Face gives it. Control tokens (the tokenizer's special
added tokens) come only from the chat template, never from what a user wrote: a `Guard` breaks them
apart before the template is rendered, see there.
"""

from __future__ import annotations

import asyncio
import os
import re
import secrets
from functools import lru_cache
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import tokenizers

from gateway.prompt.detokenize import REPLACEMENT
from gateway.prompt.model_files import BadModelFile

# Texts come one by one, and large ones in threads of ours: a pool of threads would only cost a hop.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

LARGE_TEXT_CHARS = 4_096
"""From here on a text is encoded in a thread: 1 to 2 ms on the event loop."""

_NUM_KNOWN_BYTES = (
    1 << 16
)  # tokens whose bytes are kept: log-probabilities name the same ones again and again
_NUM_KNOWN_TEXTS = 8_192  # tokens whose text is kept: answers consist of the same few thousand
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class ControlTokenInText(ValueError):  # noqa: N818
    """A text would turn into a control token, and cannot be broken apart so that it does not."""


class EncodedText(NamedTuple):
    """`offsets[i]`: characters of the text before token i. The first `num_leading` tokens are what the model
    puts before every text."""

    ids: list[int]
    offsets: list[int]
    num_leading: int


class Guard:
    """Keeps the control tokens of one conversation in the template's hands.

    `protect` puts a marker of 64 random bits into the middle of every control token that a user's text
    spells; the template is rendered over the protected texts; `cut` splits the rendered prompt at the
    markers, and the pieces are encoded apart, so that no control token is whole. A conversation that
    spells none, nearly every one, is left as it is, and so are its ids.
    """

    def __init__(self, control_tokens: list[str], any_of_them: re.Pattern[str] | None = None) -> None:
        self._control_tokens = control_tokens  # longest first
        self._any_of_them = any_of_them or any_of(control_tokens)
        self._marker = f"\ue000{secrets.randbits(64):020d}\ue001"  # digits: upper() and lower() keep them
        self._is_used = False

    def protect(self, text: str) -> str:
        """The text with its control tokens broken. Raises ControlTokenInText if one is a single character."""
        if self._any_of_them.search(text) is None:
            return text
        while spelled := [token for token in self._control_tokens if token in text]:
            for token in spelled:
                middle = len(token) // 2
                if middle == 0:
                    raise ControlTokenInText(f"the character {token!r} is a control token of this model")
                text = text.replace(token, token[:middle] + self._marker + token[middle:])
            self._is_used = True
        return text

    def cut(self, rendered: str) -> list[str]:
        """The pieces between markers, to be encoded apart: one, the text itself, if nothing was broken."""
        return rendered.split(self._marker) if self._is_used else [rendered]


def any_of(texts: list[str]) -> re.Pattern[str]:
    """Finds the first place where one of the texts is."""
    return re.compile("|".join(map(re.escape, texts)) or r"(?!)")


class Tokenizer:
    """One model's tokenizer. Safe to use from several threads: nothing changes after loading."""

    def __init__(self, path: Path) -> None:
        """Raises BadModelFile."""
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library has no class of its own
            raise BadModelFile(f"{path}: is not a tokenizer that can be read: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        added = self._tokenizer.get_added_tokens_decoder()
        special = {id: token for id, token in added.items() if token.special and token.content}
        self._control_ids = frozenset(special)
        self._id_of_control = {token.content: id for id, token in special.items()}
        self._control_tokens = sorted((token.content for token in special.values()), key=len, reverse=True)
        self._any_control_token = any_of(self._control_tokens)
        self._added = {id: token.content for id, token in added.items()}
        self._can_normalize_to_control = self._tokenizer.normalizer is not None and any(
            token.normalized for token in special.values()
        )
        self._anchor = next(
            (
                (id, token.content)
                for id, token in sorted(special.items())
                if not (token.lstrip or token.rstrip or token.single_word or token.normalized)
            ),
            None,
        )
        self._byte_of_char = _byte_level_alphabet() if self._is_byte_level() else None
        self._bytes_of = lru_cache(_NUM_KNOWN_BYTES)(self._look_up_bytes)
        self._has_bytes_only = repr(self._tokenizer.decoder).startswith("ByteLevel(")
        self.text_of = lru_cache(_NUM_KNOWN_TEXTS)(self._look_up_text)

    def guard(self) -> Guard:
        """A guard for one conversation."""
        return Guard(self._control_tokens, self._any_control_token)

    def protect(self, guard: Guard, text: str) -> str:
        """`guard.protect`, and a check for tokenizers that find control tokens after normalising.

        Raises ControlTokenInText.
        """
        protected = guard.protect(text)
        if self._can_normalize_to_control and protected:
            ids = self._tokenizer.encode(protected, add_special_tokens=False).ids
            if not self._control_ids.isdisjoint(ids):
                raise ControlTokenInText("the text becomes a control token of this model when normalised")
        return protected

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids. Control tokens in the text are parsed; `add_special_tokens` adds those of the model."""
        [encoding] = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return encoding.ids

    def encode_spans(self, text: str, *, add_special_tokens: bool) -> EncodedText:
        """As `encode`, and where in the text each token begins."""
        encoding = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        offsets, end = [], 0
        for start, stop in encoding.offsets:
            # Some do not count the space before a token as its own; those of one character begin with it.
            offsets.append(min(start, end) if stop > start else end)
            end = max(end, stop)
        leading = takewhile(bool, encoding.special_tokens_mask)
        return EncodedText(encoding.ids, offsets, sum(leading))

    def encode_pieces(self, pieces: list[str]) -> list[int]:
        """The ids of pieces that must not grow together, in a row, nothing added.

        Pieces after the first are encoded behind a control token that is then dropped, so that a
        tokenizer which puts a space before the first word of a text puts none inside it.
        """
        ids = self.encode(pieces[0], add_special_tokens=False)
        for piece in pieces[1:]:
            ids += self.encode_inner(piece)
        return ids

    def encode_inner(self, piece: str) -> list[int]:
        """The ids of a text that others go before: no space is put in front of its first word."""
        if self._anchor is None:
            return self.encode(piece, add_special_tokens=False)
        anchor_id, anchor = self._anchor
        ids = self.encode(anchor + piece, add_special_tokens=False)
        return ids[1:] if ids[:1] == [anchor_id] else self.encode(piece, add_special_tokens=False)

    def control_id(self, text: str) -> int | None:
        """The id of the control token that is written so, if there is one."""
        return self._id_of_control.get(text)

    async def encode_async(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """`encode`, in a thread when the text is large."""
        if len(text) < LARGE_TEXT_CHARS:
            return self.encode(text, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(self.encode, text, add_special_tokens=add_special_tokens)

    async def spell_async(self, ids: list[int]) -> str:
        """`spell`, in a thread when the text is large."""
        return self.spell(ids) if len(ids) < LARGE_TEXT_CHARS else await asyncio.to_thread(self.spell, ids)

    def decode(self, ids: list[int]) -> str:
        """Text without control tokens. A character cut short decodes to U+FFFD."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def name_of(self, id: int) -> str:
        """As the vocabulary has it. Empty for an unknown id."""
        return self._tokenizer.id_to_token(id) or ""

    def spell(self, ids: list[int]) -> str:
        """Text with control tokens."""
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def id_of(self, token: str) -> int | None:
        """The id of a token of the vocabulary, by its own name."""
        return self._tokenizer.token_to_id(token)

    def token_bytes(self, id: int) -> bytes:
        """The bytes that one token stands for: part of a character, perhaps. Empty for an unknown id."""
        return self._bytes_of(id)

    def _look_up_text(self, id: int) -> str | None:
        """See detokenize.Decoder: a text of GPT-2's kind is the bytes of its tokens, one after another."""
        text = self.decode([id]) if self._has_bytes_only else REPLACEMENT
        return None if REPLACEMENT in text else text

    def _look_up_bytes(self, id: int) -> bytes:
        if id in self._added:
            return self._added[id].encode()
        token = self._tokenizer.id_to_token(id)
        if token is None:
            return b""
        if self._byte_of_char is not None:
            return b"".join(self._byte_of_char.get(char, char.encode()) for char in token)
        if match := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(match[1], 16)])
        return token.replace("▁", " ").encode()

    def _is_byte_level(self) -> bool:
        return "ByteLevel" in repr(self._tokenizer.decoder)


def _byte_level_alphabet() -> dict[str, bytes]:
    """GPT-2's stand-ins for bytes: printable bytes stand for themselves, the rest move to 256 up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): bytes([byte]) for byte in printable}
    return alphabet | {chr(256 + place): bytes([byte]) for place, byte in enumerate(moved)}
