"""POST /v1/completions: the request, and the response, whose shape a stream's chunks share."""

from __future__ import annotations

from typing import Annotated

import msgspec
from pydantic import Field, PlainValidator

from gateway.protocol import bounds, fields
from gateway.protocol.common import (
    GenerationParams,
    InvalidField,
    TokenInfo,
    Usage,
)
from gateway.protocol.structured import StructuredRequest

_FORMS = "expected a string, a list of strings, token ids, or a list of lists of token ids"


def _as_prompts(value: object) -> list[str] | list[list[int]]:
    """The four ways to write it, as a list of prompts: a text, token ids, a list of either.

    By hand, not by a type: pydantic would describe every one of a million wrong ids.
    """
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise ValueError(_FORMS)
    prompts = [value] if value and type(value[0]) is int else value
    if not prompts:
        raise ValueError("there is no prompt in it")
    if len(prompts) > bounds.MAX_PROMPTS:
        raise ValueError(f"at most {bounds.MAX_PROMPTS} prompts are allowed in a request, not {len(prompts)}")
    if all(isinstance(prompt, str) for prompt in prompts):
        return prompts
    for ids in prompts:
        _check_ids(ids)
    return prompts


def _check_ids(ids: object) -> None:
    if not isinstance(ids, list) or not all(type(id) is int for id in ids):
        raise ValueError(_FORMS)
    low, high = bounds.TOKEN_ID
    if ids and not (low <= min(ids) and max(ids) <= high):
        raise ValueError(f"token ids are from {low} to {high}")


class CompletionRequest(StructuredRequest):
    rules = fields.COMPLETIONS

    prompt: Annotated[list[str] | list[list[int]], PlainValidator(_as_prompts)]
    logprobs: Annotated[int, Field(ge=bounds.LOGPROBS.min, le=bounds.LOGPROBS.max)] | None = None

    def params(self) -> GenerationParams:
        """Raises InvalidField."""
        num_sequences = len(self.prompt) * (self.n or 1)
        if num_sequences > bounds.MAX_SEQUENCES:
            raise InvalidField(
                "prompt",
                f"{len(self.prompt)} prompts with n={self.n or 1} are {num_sequences} sequences;"
                f" at most {bounds.MAX_SEQUENCES} are allowed in a request",
            )
        if self.max_tokens is None:
            default = bounds.DEFAULT_COMPLETION_TOKENS
            return self._params(max(default, self.min_tokens or 0), self.logprobs, is_max_tokens_default=True)
        return self._params(self.max_tokens, self.logprobs)


class CompletionLogprobs(msgspec.Struct, frozen=True):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class CompletionChoice(msgspec.Struct, frozen=True):
    text: str
    index: int
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """`usage` is absent in chunks unless asked for."""

    id: str
    object: str = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET
    system_fingerprint: str | None


def completion_logprobs(tokens: list[TokenInfo] | None, num_top: int | None) -> CompletionLogprobs | None:
    """The older shape; offsets count characters from the start of the answer."""
    if tokens is None:
        return None
    return CompletionLogprobs(
        tokens=[_text(info.token) for info in tokens],
        token_logprobs=[info.logprob for info in tokens],
        top_logprobs=[_top(info) for info in tokens] if num_top else None,
        text_offset=[info.text_offset for info in tokens],
    )


def _top(info: TokenInfo) -> dict[str, float]:
    """The likeliest tokens and the token's own; of two with one text the likelier."""
    top: dict[str, float] = {}
    for token, logprob in (*info.top, (info.token, info.logprob)):
        top.setdefault(_text(token), logprob)
    return top


def _text(token: bytes) -> str:
    """As OpenAI writes tokens that are no whole characters: bytes:\\xe2\\x82."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)
