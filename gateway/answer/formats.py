"""The formats of tool calls by name, and which one a model's chat template speaks."""

from __future__ import annotations

import re

from gateway.answer.deepseek import DeepSeek, DeepSeekFenced
from gateway.answer.hermes import Hermes
from gateway.answer.llama_json import LlamaJson
from gateway.answer.llama_pythonic import LlamaPythonic
from gateway.answer.mistral import Mistral
from gateway.answer.tool_format import ToolFormat

FORMATS: dict[str, type[ToolFormat]] = {
    "hermes": Hermes,
    "llama-json": LlamaJson,
    "llama-pythonic": LlamaPythonic,
    "mistral": Mistral,
    "deepseek-v3": DeepSeekFenced,
    "deepseek-v3.1": DeepSeek,
}
"""By the name that `toolFormat` has for them."""

_SIGNS = (
    ("mistral", re.compile(r"\[TOOL_CALLS\]")),
    ("deepseek-v3", re.compile(r"<｜tool▁sep｜>.*```json", re.DOTALL)),
    ("deepseek-v3.1", re.compile(r"<｜tool▁sep｜>")),
    ("llama-pythonic", re.compile(r"<\|python_start\|>|\[func\w*\(\w+=")),
    ("hermes", re.compile(r"<tool_call>(?!(\\n|\s)*<function=)")),
    ("llama-json", re.compile(r'<\|python_tag\|>|"name":.{0,80}"parameters":', re.DOTALL)),
)
"""The first that the template's source shows is its format."""


def detect(template: str) -> str | None:
    return next((name for name, sign in _SIGNS if sign.search(template)), None)
