"""Raw prompts to token ids. Here control tokens are the caller's to write, in text as in ids."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from engines.wire import Ready
from gateway.prompt.detokenize import Detokenizer
from gateway.prompt.infill import Infill, infill_of
from gateway.prompt.tokenizer import LARGE_TEXT_CHARS, Tokenizer
from gateway.protocol.common import InvalidField
from gateway.router import ServedModel, ready_groups


@dataclass(frozen=True, slots=True)
class Prompt:
    """`text` and `offsets` (characters of it before each token) are there only where they were asked for."""

    ids: list[int]
    text: str = ""
    offsets: Sequence[int] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoding:
    """How a request wants its prompts turned into ids."""

    add_special_tokens: bool = True
    max_tokens: int | None = None  # the last so many are kept, and what the model puts before every text
    has_text: bool = False
    infill: Infill | None = None
    suffix: str = ""  # that comes after what is asked for, with `infill`


async def completion_prompts(
    tokenizer: Tokenizer, prompts: Sequence[str] | Sequence[list[int]], encoding: Encoding
) -> list[Prompt]:
    """In a thread when they are large."""

    def encode() -> list[Prompt]:
        return [_encode(tokenizer, prompt, encoding) for prompt in prompts]

    size = sum(len(prompt) for prompt in prompts if encoding.has_text or isinstance(prompt, str))
    return encode() if size < LARGE_TEXT_CHARS else await asyncio.to_thread(encode)


def _encode(tokenizer: Tokenizer, prompt: str | list[int], encoding: Encoding) -> Prompt:
    if encoding.infill is not None:
        return _encode_infill(tokenizer, prompt, encoding, encoding.infill)
    if not isinstance(prompt, str):
        ids = prompt if encoding.max_tokens is None else prompt[-encoding.max_tokens :]
        return _with_text(tokenizer, ids) if encoding.has_text else Prompt(ids)
    if encoding.has_text or encoding.max_tokens is not None:
        return _encode_spans(tokenizer, prompt, encoding)
    return Prompt(tokenizer.encode(prompt, add_special_tokens=encoding.add_special_tokens))


def _encode_spans(tokenizer: Tokenizer, text: str, encoding: Encoding) -> Prompt:
    ids, offsets, num_leading = tokenizer.encode_spans(text, add_special_tokens=encoding.add_special_tokens)
    if encoding.max_tokens is None or len(ids) <= encoding.max_tokens:
        return Prompt(ids, text, offsets)
    first = min(len(ids) - encoding.max_tokens + num_leading, len(ids))
    cut = offsets[first] if first < len(ids) else len(text)
    kept = [0] * num_leading + [offset - cut for offset in offsets[first:]]
    return Prompt(ids[:num_leading] + ids[first:], text[cut:], kept)


def _encode_infill(
    tokenizer: Tokenizer, prefix: str | list[int], encoding: Encoding, infill: Infill
) -> Prompt:
    suffix = tokenizer.encode_inner(encoding.suffix)
    if not isinstance(prefix, str):
        return Prompt(infill.prompt((), prefix, suffix))
    lead = tokenizer.encode("", add_special_tokens=encoding.add_special_tokens)
    return Prompt(infill.prompt(lead, tokenizer.encode(prefix, add_special_tokens=False), suffix))


class _Spelled:
    """A tokenizer whose control tokens are text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.decode = tokenizer.spell

    def text_of(self, id: int) -> str | None:
        return None


def _with_text(tokenizer: Tokenizer, ids: list[int]) -> Prompt:
    """The text of ids, token by token, control tokens spelled out: the caller has written them."""
    detokenizer = Detokenizer(_Spelled(tokenizer))
    pieces: list[str] = []
    offsets, length = [], 0
    for id in ids:
        offsets.append(length)
        pieces.append(detokenizer.push((id,)))
        length += len(pieces[-1])
    return Prompt(ids, "".join([*pieces, detokenizer.flush()]), offsets)


def require_infill(model: ServedModel) -> Infill:
    """The tokens that a suffix needs. Raises InvalidField."""
    infill = infill_of(model.tokenizer)
    if infill is None:
        raise InvalidField(
            "suffix",
            f"The model '{model.name}' cannot write what stands before a 'suffix': its tokenizer has no"
            " fill-in-the-middle tokens. Leave it out, or ask a code model that has them.",
        )
    return infill


def require_ready(model: ServedModel) -> Ready:
    """What a ready group says of itself. Fails fast, before a prompt is tokenised. Raises WorkerUnavailable,
    ModelFailed."""
    info = ready_groups(model)[0].info
    assert info is not None, "a ready group has said what it is"
    return info
