"""Renders one chat template in a process of its own: `python -m gateway.prompt.render_process`.

A template is a program of whoever made the model, so it gets a share of time and memory that the kernel
enforces: a sandbox cannot tell what `10 ** 10 ** 8` will take. The job says what to render; a question is a
conversation, its answer {"text": ...} or {"refused": ...}.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gateway.helper_process import answer_questions
from gateway.prompt.conversation import Conversation
from gateway.prompt.template import ChatTemplate, TemplateRefused


def _begin(job: dict[str, Any]) -> Callable[[Any], dict[str, str]]:
    template = ChatTemplate(job["source"], job["special_tokens"])

    def render(conversation: Any) -> dict[str, str]:
        try:
            return {"text": template.render(Conversation(**conversation))}
        except TemplateRefused as error:
            return {"refused": str(error)}

    return render


if __name__ == "__main__":
    answer_questions(_begin)
