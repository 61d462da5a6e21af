"""POST /v1/embeddings: the request, and the response."""

from __future__ import annotations

import base64
import struct
from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec
from pydantic import Field, PlainValidator

from gateway.protocol import bounds, fields
from gateway.protocol.common import InvalidField, ModelName, RequestPart, TokenId
from gateway.protocol.completions import as_prompts

Format = Literal["float", "base64"]


def _as_inputs(value: object) -> list[str] | list[list[int]]:
    inputs = as_prompts(value, "input", bounds.MAX_INPUTS)
    for place, one in enumerate(inputs):
        if not one:
            name = name_of(place, len(inputs))
            raise InvalidField(name, f"'{name}' is empty: there is nothing to make a vector of")
    return inputs


def name_of(place: int, num_inputs: int) -> str:
    """Of one input, as errors call it."""
    return f"input[{place}]" if num_inputs > 1 else "input"


_Text = Annotated[str, Field(min_length=1)]
_TokenIds = Annotated[list[TokenId], Field(min_length=1)]
_Several = Field(min_length=1, max_length=bounds.MAX_INPUTS)
Inputs = Annotated[
    list[str] | list[list[int]],
    PlainValidator(
        _as_inputs,
        json_schema_input_type=_Text
        | Annotated[list[_Text], _Several]
        | _TokenIds
        | Annotated[list[_TokenIds], _Several],
    ),
]


class EmbeddingsRequest(RequestPart):
    """OpenAI's, with vLLM's `add_special_tokens` and `truncate_prompt_tokens`."""

    rules = fields.EMBEDDINGS

    model: ModelName
    input: Inputs
    encoding_format: Format | None = None
    dimensions: Annotated[int, Field(ge=bounds.DIMENSIONS.min, le=bounds.DIMENSIONS.max)] | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: (
        Annotated[int, Field(ge=bounds.TRUNCATE_PROMPT_TOKENS.min, le=bounds.TRUNCATE_PROMPT_TOKENS.max)]
        | None
    ) = None

    def max_tokens(self, max_model_len: int) -> int | None:
        """To which the inputs are cut; None: they are not. Raises InvalidField."""
        if self.truncate_prompt_tokens == 0:
            name = "truncate_prompt_tokens"
            raise InvalidField(name, f"'{name}' 0 leaves nothing: at least 1, or -1 for what fits")
        return max_model_len if self.truncate_prompt_tokens == -1 else self.truncate_prompt_tokens


class EmbeddingObject(msgspec.Struct, frozen=True, kw_only=True):
    """`embedding` in base64 is of float32, little-endian."""

    object: str = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingsUsage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    total_tokens: int


class Embeddings(msgspec.Struct, frozen=True, kw_only=True):
    object: str = "list"
    data: list[EmbeddingObject]
    model: str
    usage: EmbeddingsUsage


def embeddings(vectors: Sequence[bytes], format: Format, model: str, num_tokens: int) -> Embeddings:
    """`vectors`: each as float32, little-endian."""
    write = _base64 if format == "base64" else _floats
    data = [EmbeddingObject(index=i, embedding=write(vector)) for i, vector in enumerate(vectors)]
    return Embeddings(data=data, model=model, usage=EmbeddingsUsage(num_tokens, num_tokens))


def _base64(vector: bytes) -> str:
    return base64.b64encode(vector).decode("ascii")


def _floats(vector: bytes) -> list[float]:
    return list(struct.unpack(f"<{len(vector) // 4}f", vector))
