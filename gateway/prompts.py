"""Raw prompts to token ids."""

from __future__ import annotations

from collections.abc import Sequence

from gateway.router import ServedModel, ready_groups


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
