"""POST /tokenize and /detokenize, GET /tokenizer_info: as vLLM has them."""

from __future__ import annotations

from typing import Self

import msgspec
from pydantic import model_validator

from gateway.protocol import fields
from gateway.protocol.chat import ChatCompletionRequest, TemplateVariables
from gateway.protocol.common import InvalidField, ModelName, RequestPart
from gateway.protocol.completions import TokenIds
from gateway.protocol.messages import Messages
from gateway.protocol.tools import Tools


class TokenizeRequest(RequestPart):
    """Of a text, or of a conversation. Without `model` it is for the one that is served."""

    rules = fields.TOKENIZE

    model: ModelName | None = None
    prompt: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    messages: Messages | None = None
    tools: Tools | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: TemplateVariables | None = None

    @model_validator(mode="after")
    def _is_one_of_two(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise InvalidField("prompt", "Either 'prompt' or 'messages' is to be tokenized")
        for name in _CHAT_FIELDS:
            if self.messages is None and getattr(self, name) is not None:
                raise InvalidField(name, f"'{name}' is only allowed with 'messages'")
        if self.messages is not None and self.add_special_tokens:
            raise InvalidField(
                "add_special_tokens", "With 'messages' the chat template writes special tokens"
            )
        return self

    def as_chat(self, model: str) -> ChatCompletionRequest:
        """The chat that the messages would be sent with. Raises pydantic.ValidationError."""
        parts = {name: getattr(self, name) for name in ("messages", *_CHAT_FIELDS)}
        return ChatCompletionRequest(model=model, **parts)


_CHAT_FIELDS = ("tools", "add_generation_prompt", "continue_final_message", "chat_template_kwargs")


class Tokenized(msgspec.Struct, frozen=True):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeRequest(RequestPart):
    rules = fields.DETOKENIZE

    model: ModelName | None = None
    tokens: TokenIds


class Detokenized(msgspec.Struct, frozen=True):
    prompt: str
