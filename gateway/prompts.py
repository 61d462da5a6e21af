"""Prompts to token ids: conversations through the model's template, raw prompts as they are."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from gateway.prompt.tokenizer import LARGE_TEXT_CHARS
from gateway.router import ServedModel, ready_groups


class NoChatTemplate(ValueError):  # noqa: N818
    """Chat was asked of a model that has no chat template."""


async def chat_prompt(model: ServedModel, messages: Sequence[dict[str, str]]) -> list[int]:
    """The ids of a conversation. Raises NoChatTemplate, TemplateRefused, ControlTokenInText."""
    if model.template is None:
        raise NoChatTemplate(
            f"The model '{model.name}' has no chat template: use /v1/completions,"
            " or start the server with one."
        )
    is_large = sum(len(text) for message in messages for text in message.values()) >= LARGE_TEXT_CHARS
    tokenizer, guard = model.tokenizer, model.tokenizer.guard()

    def protect() -> list[dict[str, str]]:
        return [
            {key: tokenizer.protect(guard, value) for key, value in message.items()} for message in messages
        ]

    rendered = await model.template.render(await asyncio.to_thread(protect) if is_large else protect())
    pieces = guard.cut(rendered)
    if not is_large:
        return tokenizer.encode_pieces(pieces)
    return await asyncio.to_thread(tokenizer.encode_pieces, pieces)


async def completion_prompts(
    model: ServedModel, prompts: Sequence[str] | Sequence[list[int]]
) -> list[list[int]]:
    """The ids of raw prompts. Here control tokens are the caller's to write, in text as in ids."""
    return [
        await model.tokenizer.encode_async(prompt, add_special_tokens=True)
        if isinstance(prompt, str)
        else prompt
        for prompt in prompts
    ]


def require_ready(model: ServedModel) -> None:
    """Fails fast, before a prompt is tokenised. Raises WorkerUnavailable, ModelFailed."""
    ready_groups(model)
