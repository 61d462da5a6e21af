"""POST /tokenize and /detokenize, GET /tokenizer_info: as vLLM has them."""

from __future__ import annotations

from typing import Annotated, Self

import msgspec
from pydantic import Field, PlainValidator, model_validator

from gateway.protocol import fields
from gateway.protocol.common import InvalidField, RequestPart
from gateway.protocol.completions import token_ids
from gateway.protocol.messages import Messages

ModelName = Annotated[str, Field(min_length=1, max_length=1_000)]


class TokenizeRequest(RequestPart):
    """Of a text, or of a conversation. Without `model` it is for the one that is served."""

    rules = fields.TOKENIZE

    model: ModelName | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _is_one_of_two(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise InvalidField("prompt", "Either 'prompt' or 'messages' is to be tokenized")
        if self.messages is None:
            for name in ("add_generation_prompt", "continue_final_message"):
                if getattr(self, name) is not None:
                    raise InvalidField(name, f"'{name}' is only allowed with 'messages'")
            return self
        if self.add_special_tokens:
            raise InvalidField(
                "add_special_tokens", "With 'messages' the chat template writes special tokens"
            )
        if self.continue_final_message and self.add_generation_prompt is not False:
            raise InvalidField(
                "continue_final_message", "'continue_final_message' needs 'add_generation_prompt': false"
            )
        return self


class Tokenized(msgspec.Struct, frozen=True):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeRequest(RequestPart):
    rules = fields.DETOKENIZE

    model: ModelName | None = None
    tokens: Annotated[list[int], PlainValidator(token_ids)]


class Detokenized(msgspec.Struct, frozen=True):
    prompt: str
