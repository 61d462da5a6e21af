"""POST /v1/completions: the request, and the response, whose shape a stream's chunks share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated

import msgspec
from pydantic import Field, PlainValidator

from gateway.protocol import bounds, fields
from gateway.protocol.common import (
    GenerationParams,
    InvalidField,
    PromptToken,
    TokenId,
    TokenInfo,
    Usage,
)
from gateway.protocol.structured import StructuredRequest

_FORMS = "expected a string, a list of strings, token ids, or a list of lists of token ids"


def as_prompts(value: object, name: str, most: int) -> list[str] | list[list[int]]:
    """The four ways to write it, as a list of prompts: a text, token ids, a list of either. `name`: of one.

    By hand, not by a type: pydantic would describe every one of a million wrong ids. Raises ValueError.
    """
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise ValueError(_FORMS)
    prompts = [value] if value and type(value[0]) is int else value
    if not prompts:
        raise ValueError(f"there is no {name} in it")
    if len(prompts) > most:
        raise ValueError(f"at most {most} {name}s are allowed in a request, not {len(prompts)}")
    if all(isinstance(prompt, str) for prompt in prompts):
        return prompts
    return [token_ids(ids, _FORMS) for ids in prompts]


def token_ids(ids: object, expected: str = "expected a list of token ids") -> list[int]:
    """Raises ValueError."""
    if not isinstance(ids, list) or not all(type(id) is int for id in ids):
        raise ValueError(expected)
    low, high = bounds.TOKEN_ID
    if ids and not (low <= min(ids) and max(ids) <= high):
        raise ValueError(f"token ids are from {low} to {high}")
    return ids


_TokenIds = list[TokenId]
_Several = Field(min_length=1, max_length=bounds.MAX_PROMPTS)
Prompts = Annotated[
    list[str] | list[list[int]],
    PlainValidator(
        partial(as_prompts, name="prompt", most=bounds.MAX_PROMPTS),
        json_schema_input_type=str
        | Annotated[list[str], _Several]
        | Annotated[_TokenIds, Field(min_length=1)]
        | Annotated[list[_TokenIds], _Several],
    ),
]
TokenIds = Annotated[list[int], PlainValidator(token_ids, json_schema_input_type=_TokenIds)]


class CompletionRequest(StructuredRequest):
    rules = fields.COMPLETIONS

    prompt: Prompts
    suffix: str | None = None
    echo: bool | None = None
    max_tokens: Annotated[int, Field(ge=0, le=bounds.MAX_TOKENS.max)] | None = None
    best_of: Annotated[int, Field(ge=bounds.BEST_OF.min, le=bounds.BEST_OF.max)] | None = None
    logprobs: Annotated[int, Field(ge=bounds.TOP_LOGPROBS.min, le=bounds.TOP_LOGPROBS.max)] | None = None
    prompt_logprobs: Annotated[int, Field(ge=bounds.TOP_LOGPROBS.min, le=bounds.TOP_LOGPROBS.max)] | None = (
        None
    )
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: (
        Annotated[int, Field(ge=bounds.TRUNCATE_PROMPT_TOKENS.min, le=bounds.TRUNCATE_PROMPT_TOKENS.max)]
        | None
    ) = None

    @property
    def num_scored(self) -> int | None:
        """How many of the likeliest tokens are asked for at each place of the prompt; None: nothing is."""
        asked = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return max((count for count in asked if count is not None), default=None)

    def params(self) -> GenerationParams:
        """Raises InvalidField."""
        for param, message in self._contradictions():
            raise InvalidField(param, message)
        max_tokens, is_default = self.max_tokens, self.max_tokens is None
        if max_tokens is None:
            max_tokens = max(bounds.DEFAULT_COMPLETION_TOKENS, self.min_tokens or 0)
        return replace(
            self._params(max_tokens, self.logprobs, is_max_tokens_default=is_default),
            best_of=None if self.best_of == (self.n or 1) else self.best_of,
            has_end_logprob=True,
            prompt_logprobs=self.num_scored,
        )

    def _contradictions(self) -> Iterator[tuple[str, str]]:
        """What cannot be asked for together: (field, why)."""
        n = self.n or 1
        best_of = self.best_of or n
        if best_of < n:
            yield "best_of", f"'best_of' ({best_of}) is how many are drawn: it cannot be below 'n' ({n})"
        if best_of > n and self.stream:
            yield "best_of", "'best_of' cannot be streamed: which are best is known at the end"
        if len(self.prompt) * best_of > bounds.MAX_SEQUENCES:
            name = "n" if best_of == n else "best_of"
            total = len(self.prompt) * best_of
            yield (
                "prompt",
                f"{len(self.prompt)} prompts with {name}={best_of} are {total} sequences;"
                f" at most {bounds.MAX_SEQUENCES} are allowed in a request",
            )
        if self.max_tokens == 0 and not self.echo and self.prompt_logprobs is None:
            yield (
                "max_tokens",
                "'max_tokens' 0 asks for nothing: at least 1, or 'echo' or 'prompt_logprobs' with it",
            )
        if self.prompt_logprobs is not None and self.stream:
            yield "prompt_logprobs", "'prompt_logprobs' cannot be streamed: 'echo' with 'logprobs' can"
        if self.truncate_prompt_tokens == 0:
            yield "truncate_prompt_tokens", "'truncate_prompt_tokens' 0 leaves nothing: at least 1, or -1"
        if self.suffix:
            for name in ("echo", "truncate_prompt_tokens"):
                if getattr(self, name):
                    yield name, f"'{name}' is not allowed with 'suffix'"


class CompletionLogprobs(msgspec.Struct, frozen=True):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class PromptLogprob(msgspec.Struct, frozen=True):
    """vLLM's. The rank is known of the tokens that were asked for, and of a likelier one."""

    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[int, PromptLogprob] | None]
"""For each token of the prompt, by id: its own and the likeliest; None for the first."""


class CompletionChoice(msgspec.Struct, frozen=True):
    """`prompt_logprobs` is absent unless asked for."""

    text: str
    index: int
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    prompt_logprobs: PromptLogprobs | msgspec.UnsetType = msgspec.UNSET


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """`usage` is absent in chunks unless asked for."""

    id: str
    object: str = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET
    system_fingerprint: str | None


def completion_logprobs(
    prompt: Sequence[PromptToken] | None, tokens: Sequence[TokenInfo] | None, num_top: int | None
) -> CompletionLogprobs | None:
    """The older shape, of an echoed prompt and of the answer; offsets count characters of a choice's text."""
    if num_top is None:
        return None
    prompt, tokens = prompt or (), tokens or ()
    shown: list[PromptToken | TokenInfo] = [*prompt, *tokens]
    top: list[dict[str, float] | None] = []
    if num_top:
        top += [_top_of_prompt(token, num_top) for token in prompt]
        top += [_top(info.token, info.logprob, info.top) for info in tokens]
    return CompletionLogprobs(
        tokens=[_text(one.token) for one in shown],
        token_logprobs=[one.logprob for one in shown],
        top_logprobs=top if num_top else None,
        text_offset=[one.text_offset for one in shown],
    )


def prompt_logprobs(prompt: Sequence[PromptToken], num_top: int) -> PromptLogprobs:
    return [_by_id(token, num_top) for token in prompt]


def _by_id(token: PromptToken, num_top: int) -> dict[int, PromptLogprob] | None:
    if token.logprob is None:
        return None
    found = {
        id: PromptLogprob(logprob, rank, _text(text))
        for rank, (id, text, logprob) in enumerate(token.top[:num_top], 1)
    }
    found.setdefault(token.id, PromptLogprob(token.logprob, None, _text(token.token)))
    return found


def _top_of_prompt(token: PromptToken, num_top: int) -> dict[str, float] | None:
    if token.logprob is None:
        return None
    return _top(token.token, token.logprob, [(text, logprob) for _, text, logprob in token.top[:num_top]])


def _top(own: bytes, own_logprob: float, likeliest: Sequence[tuple[bytes, float]]) -> dict[str, float]:
    """The likeliest tokens and the token's own; of two with one text the likelier."""
    top: dict[str, float] = {}
    for token, logprob in (*likeliest, (own, own_logprob)):
        top.setdefault(_text(token), logprob)
    return top


def _text(token: bytes) -> str:
    """As OpenAI writes tokens that are no whole characters: bytes:\\xe2\\x82."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)
