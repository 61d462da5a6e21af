"""A chat template's rendering, bounded in time, memory and size."""

from __future__ import annotations

from dataclasses import fields

from gateway.helper import Helper, HelperKilled
from gateway.prompt.conversation import Conversation
from gateway.prompt.template import ChatTemplate, TemplateRefused

RENDER_SECONDS = 1.0
"""Processor time for one conversation; templates take milliseconds."""


class Renderer:
    """Renders one template, in a helper process."""

    def __init__(self, template: ChatTemplate, seconds: float = RENDER_SECONDS) -> None:
        self.template, self._seconds = template, seconds
        job = {"source": template.source, "special_tokens": template.special_tokens, "seconds": seconds}
        self._helper = Helper("gateway.prompt.render_process", job)

    def start(self) -> None:
        """So that the first conversation need not wait."""
        self._helper.start()

    async def render(self, conversation: Conversation) -> str:
        """The prompt that asks for the next message. Raises TemplateRefused."""
        parts = {field.name: getattr(conversation, field.name) for field in fields(conversation)}
        try:
            result = await self._helper.ask(parts)
        except HelperKilled as error:
            raise TemplateRefused(
                f"the model's chat template took more than {self._seconds:g} s or too much memory"
                " on these messages"
            ) from error
        if "refused" in result:
            raise TemplateRefused(result["refused"])
        text: str = result["text"]
        return text
