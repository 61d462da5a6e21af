"""A conversation to the ids of a prompt, in which no text of a user's becomes a control token."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

from gateway.prompt.conversation import RESERVED, Conversation
from gateway.prompt.template import ChatTemplate
from gateway.prompt.tokenizer import LARGE_TEXT_CHARS
from gateway.protocol.common import InvalidField
from gateway.router import ServedModel

_NUM_TAIL_CHARS = 4_096


class NoChatTemplate(ValueError):  # noqa: N818
    """Chat was asked of a model that has no chat template."""


class ChatPrompt(NamedTuple):
    ids: list[int]
    tail: str  # the end of the text that they are of


def template_of(model: ServedModel) -> ChatTemplate:
    """Raises NoChatTemplate."""
    if model.template is None:
        raise NoChatTemplate(
            f"The model '{model.name}' has no chat template: use /v1/completions,"
            " or start the server with one."
        )
    return model.template.template


async def chat_prompt(model: ServedModel, conversation: Conversation) -> ChatPrompt:
    """Every string of the conversation is guarded: contents, names, and what tools and their calls say.

    Raises NoChatTemplate, InvalidField, TemplateRefused, ControlTokenInText."""
    _check_variables(template_of(model), conversation)
    assert model.template is not None
    tokenizer, guard = model.tokenizer, model.tokenizer.guard()

    def protect() -> Conversation:
        return conversation.map_strings(lambda text: tokenizer.protect(guard, text))

    is_large = conversation.num_chars >= LARGE_TEXT_CHARS
    rendered = await model.template.render(await asyncio.to_thread(protect) if is_large else protect())
    pieces = guard.cut(rendered)
    encode = tokenizer.encode_pieces
    ids = await asyncio.to_thread(encode, pieces) if is_large else encode(pieces)
    return ChatPrompt(ids, rendered[-_NUM_TAIL_CHARS:])


def _check_variables(template: ChatTemplate, conversation: Conversation) -> None:
    """A variable that the template does not read would be ignored in silence."""
    known = template.variables - RESERVED - template.special_tokens.keys()
    for name in conversation.variables:
        if name not in known:
            raise InvalidField(
                "chat_template_kwargs",
                f"This model's chat template has no variable {name[:100]!r}; leave it out.",
            )
