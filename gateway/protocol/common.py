"""What both endpoints share: reading a body, the sampling fields, usage and logprobs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Annotated, Any, ClassVar, NamedTuple, Self, TypeVar

import msgspec
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, GetJsonSchemaHandler, model_validator
from pydantic_core import core_schema

from gateway.protocol import bounds
from gateway.protocol.bounds import Range
from gateway.protocol.fields import STREAM_OPTIONS, Rule, without_unused
from gateway.protocol.json_body import parse_object


class InvalidField(ValueError):  # noqa: N818
    """A field's value is not allowed, or not together with another one. `param` names it."""

    def __init__(self, param: str | None, message: str) -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationParams:
    """How to generate, in the words of the API; valid. The same for both endpoints."""

    max_tokens: int | None = None  # None: as many as fit
    is_max_tokens_default: bool = False  # a default shrinks to what fits, a wish does not
    min_tokens: int = 0
    n: int = 1
    best_of: int | None = None  # sequences drawn for the n that are shown, the likeliest; None: n
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool = False  # what ended the text is shown
    ignore_eos: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    logprobs: int | None = None  # None: none; k: the token's own and the k likeliest
    has_end_logprob: bool = False  # the end token's, too
    prompt_logprobs: int | None = None  # the same of the prompt's tokens
    cache_key: str = ""  # equal keys share prefixes: their sequences go to one group while that can take them
    grammar: str | None = None  # of llguidance, that the text must match: Lark, or JSON with "grammars"

    @property
    def num_drawn(self) -> int:
        """Sequences of each prompt."""
        return self.best_of or self.n


LOWEST_LOGPROB = -9999.0
"""What OpenAI says for the logarithm of nothing, which JSON has no word for."""


@dataclass(frozen=True, slots=True)
class TokenInfo:
    """A generated token that has been shown, with its log-probability."""

    token: bytes
    logprob: float
    top: tuple[tuple[bytes, float], ...]  # likeliest first
    text_offset: int  # characters of the answer before it


class PromptToken(NamedTuple):
    """A token of a prompt. The first one has no log-probability."""

    id: int
    token: bytes
    text_offset: int  # characters of the prompt before it
    logprob: float | None
    top: Sequence[tuple[int, bytes, float]]  # likeliest first


@dataclass(frozen=True, slots=True)
class PromptReport:
    """What an answer tells of its prompt."""

    text: str
    tokens: Sequence[PromptToken] | None  # None when their log-probabilities were not asked for


class PromptTokensDetails(msgspec.Struct, frozen=True):
    cached_tokens: int = 0


class CompletionTokensDetails(msgspec.Struct, frozen=True):
    reasoning_tokens: int = 0
    accepted_prediction_tokens: int = 0
    rejected_prediction_tokens: int = 0


class Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails = CompletionTokensDetails()


encoder = msgspec.json.Encoder()


def _bounded(range: Range) -> Any:
    return Field(ge=range.min, le=range.max)


def _as_strings(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _logit_bias(value: object) -> object:
    """JSON keys are strings; ids are numbers."""
    if not isinstance(value, dict):
        return value
    if len(value) > bounds.MAX_LOGIT_BIASES:
        raise ValueError(f"at most {bounds.MAX_LOGIT_BIASES} tokens can be biased, not {len(value)}")
    if bad := [
        key
        for key in value
        if not (isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 11)
    ]:
        raise ValueError(f"keys are token ids written as strings, not {str(bad[0])[:40]!r}")
    return {int(key): bias for key, bias in value.items()}


ModelName = Annotated[str, Field(min_length=1, max_length=1_000)]
TokenId = Annotated[int, _bounded(bounds.TOKEN_ID)]
_StopString = Annotated[str, Field(min_length=1, max_length=bounds.MAX_STOP_CHARS)]
_StopStrings = Annotated[list[_StopString], Field(max_length=bounds.MAX_STOP_STRINGS, fail_fast=True)]
StopStrings = Annotated[
    _StopStrings, BeforeValidator(_as_strings, json_schema_input_type=_StopString | _StopStrings)
]
StopTokenIds = Annotated[list[TokenId], Field(max_length=bounds.MAX_STOP_TOKEN_IDS, fail_fast=True)]
_Bias = Annotated[float, _bounded(bounds.LOGIT_BIAS)]
_WrittenTokenId = Annotated[str, Field(pattern="^[0-9]{1,10}$")]
LogitBias = Annotated[
    dict[TokenId, _Bias],
    BeforeValidator(
        _logit_bias,
        json_schema_input_type=Annotated[
            dict[_WrittenTokenId, _Bias],
            Field(max_length=bounds.MAX_LOGIT_BIASES, json_schema_extra={"additionalProperties": False}),
        ],
    ),
]


class RequestPart(BaseModel):
    """An object in a request: exact types, no NaN, only known fields, null means left out."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)
    rules: ClassVar[Mapping[str, Rule]] = {}

    @model_validator(mode="before")
    @classmethod
    def _keep_supported(cls, given: object) -> object:
        if not isinstance(given, dict):
            return given
        return without_unused(given, cls.rules, _names(cls))

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """With the fields that are ignored, and those that are refused but for some values."""
        described = handler(schema)
        properties = handler.resolve_ref_schema(described).setdefault("properties", {})
        for name, rule in cls.rules.items():
            properties.setdefault(name, rule.json_schema())
        return described


@cache
def _names(part: type[RequestPart]) -> frozenset[str]:
    """Its fields, as clients call them."""
    return frozenset(field.alias or name for name, field in part.model_fields.items())


class StreamOptions(RequestPart):
    rules = STREAM_OPTIONS

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class SampledRequest(RequestPart):
    """How tokens are drawn, and where they end."""

    model: ModelName
    stream: bool | None = None
    stop: StopStrings | None = None
    stop_token_ids: StopTokenIds | None = None
    temperature: Annotated[float, _bounded(bounds.TEMPERATURE)] | None = None
    top_p: Annotated[float, _bounded(bounds.TOP_P)] | None = None
    top_k: Annotated[int, _bounded(bounds.TOP_K)] | None = None
    min_p: Annotated[float, _bounded(bounds.MIN_P)] | None = None
    presence_penalty: Annotated[float, _bounded(bounds.PRESENCE_PENALTY)] | None = None
    frequency_penalty: Annotated[float, _bounded(bounds.FREQUENCY_PENALTY)] | None = None
    repetition_penalty: Annotated[float, _bounded(bounds.REPETITION_PENALTY)] | None = None
    logit_bias: LogitBias | None = None
    seed: Annotated[int, _bounded(bounds.SEED)] | None = None

    def sampling(self, max_tokens: int | None, logprobs: int | None) -> GenerationParams:
        """With defaults for what was left out."""
        return GenerationParams(
            max_tokens=max_tokens,
            stop=tuple(self.stop or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            temperature=_given(self.temperature, 1.0),
            top_p=_given(self.top_p, 1.0),
            top_k=max(_given(self.top_k, 0), 0),
            min_p=_given(self.min_p, 0.0),
            presence_penalty=_given(self.presence_penalty, 0.0),
            frequency_penalty=_given(self.frequency_penalty, 0.0),
            repetition_penalty=_given(self.repetition_penalty, 1.0),
            logit_bias=self.logit_bias or {},
            seed=self.seed,
            logprobs=logprobs,
        )


class GenerationRequest(SampledRequest):
    """The fields of chats and completions."""

    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, _bounded(bounds.MAX_TOKENS)] | None = None
    min_tokens: Annotated[int, _bounded(bounds.MIN_TOKENS)] | None = None
    n: Annotated[int, _bounded(bounds.N)] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise InvalidField("stream_options", "'stream_options' is only allowed when 'stream' is true")
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        return self.include_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)

    def _params(
        self, max_tokens: int | None, logprobs: int | None, *, is_max_tokens_default: bool = False
    ) -> GenerationParams:
        """Raises InvalidField."""
        min_tokens = self.min_tokens or 0
        if max_tokens is not None and not is_max_tokens_default and min_tokens > max_tokens:
            raise InvalidField(
                "min_tokens", f"'min_tokens' ({min_tokens}) is above the maximum ({max_tokens})"
            )
        return replace(
            self.sampling(max_tokens, logprobs),
            is_max_tokens_default=is_max_tokens_default,
            min_tokens=min_tokens,
            n=_given(self.n, 1),
            ignore_eos=bool(self.ignore_eos),
            include_stop=bool(self.include_stop_str_in_output),
        )


Value = TypeVar("Value")
Request = TypeVar("Request", bound=RequestPart)


def _given(value: Value | None, default: Value) -> Value:
    return default if value is None else value


def require_free_end(ignore_eos: bool | None, min_tokens: int | None, form: str) -> None:
    """For an answer that ends where `form` has it end. Raises InvalidField."""
    for param, value in (("ignore_eos", ignore_eos), ("min_tokens", min_tokens)):
        if value:
            raise InvalidField(
                param, f"'{param}' is not allowed with {form}, which says where the answer ends"
            )


def parse_body(body: bytes, model: type[Request]) -> Request:
    """A valid request.

    Raises MalformedBody, UnknownField, UnsupportedField, InvalidField, pydantic.ValidationError.
    """
    return model.model_validate(parse_object(body))
