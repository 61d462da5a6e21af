"""Models for tests of chats: templates in the manner of real ones, each with a tokenizer that has its marks,
and a group that says what the test has written."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from fastapi import FastAPI
from tokenizers import AddedToken, Tokenizer

from engines.wire import Generate, TokenDelta
from gateway.app import create_app
from gateway.settings import Settings
from gateway.workers.protocol import Take
from tests.fakes import FakeGroup, ready
from tests.gateway.serving import listening, make_model_dir, make_served

HERMES = """\
{%- if tools %}<|system|>
{% if messages[0].role == 'system' %}{{ messages[0].content }}

{% endif %}You may call functions: <tools>{% for tool in tools %}
{{ tool | tojson }}{% endfor %}
</tools>
Answer with <tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call><|end|>
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}<|user|>
<tool_response>
{{ message.content }}
</tool_response><|end|>
{%- elif message.role != 'system' or not tools %}<|{{ message.role }}|>
{{ message.content or '' }}
{%- for call in message.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|end|>
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>
{% endif %}"""

LLAMA_JSON = """\
{{- bos_token }}
{%- if not tools is defined %}{% set tools = none %}{% endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}<|system|>ipython
{{ message.content | tojson }}<|end|>
{%- elif 'tool_calls' in message %}<|assistant|>
{{- '{"name": "' + message.tool_calls[0].function.name + '", "parameters": ' }}
{{- message.tool_calls[0].function.arguments | tojson + '}' }}<|end|>
{%- else %}<|{{ message.role }}|>
{% if tools is not none and loop.first %}Respond in the format {"name": function name, \
"parameters": dictionary of argument name and its value}. \
{% for tool in tools %}{{ tool | tojson(indent=4) }}{% endfor %}
{% endif %}{{ message.content | trim }}<|end|>
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>
{% endif %}"""

LLAMA_PYTHONIC = """\
{{- bos_token }}{% if tools %}<|system|>Call like this: [func_name1(params_name1=params_value1)]
{{ tools | tojson }}<|end|>{% endif %}
{%- for message in messages %}<|{{ message.role }}|>{{ message.content }}
{%- for call in message.tool_calls or [] %}[{{ call.function.name }}({% for key, value in \
call.function.arguments.items() %}{{ key }}={{ value | tojson }}{% endfor %})]{% endfor %}<|end|>{% endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""

MISTRAL = """\
{{- bos_token }}
{%- if tools %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}
{%- for message in messages %}
{%- if message.role == 'user' %}[INST] {{ message.content }}[/INST]
{%- elif message.role == 'tool' %}
{%- if message.tool_call_id | length != 9 %}{{ raise_exception('ids have 9 characters') }}{% endif %}
{{- '[TOOL_RESULTS] {"content": ' + message.content | tojson + ', "call_id": "' + message.tool_call_id }}"}\
[/TOOL_RESULTS]
{%- elif message.tool_calls is defined and message.tool_calls is not none %}[TOOL_CALLS] [
{%- for call in message.tool_calls %}
{%- if call.id | length != 9 %}{{ raise_exception('ids have 9 characters') }}{% endif %}
{{- call.function | tojson }}{% if not loop.last %}, {% endif %}{% endfor %}]{{ eos_token }}
{%- else %} {{ message.content }}{{ eos_token }}{% endif %}
{%- endfor %}"""

DEEPSEEK = """\
{{- bos_token }}{% if tools %}Tools: {{ tools | tojson }}{% endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}<｜tool▁output▁begin｜>{{ message.content }}<｜tool▁output▁end｜>
{%- elif message.tool_calls %}<|assistant|>{{ '<｜tool▁calls▁begin｜>' }}
{%- for call in message.tool_calls %}{{ '<｜tool▁call▁begin｜>' + call.type + '<｜tool▁sep｜>' \
+ call.function.name + '\\n```json\\n' + call.function.arguments | tojson \
+ '\\n```<｜tool▁call▁end｜>' }}{% endfor %}\
{{ '<｜tool▁calls▁end｜>' }}<|end|>
{%- else %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""

THINKING = """\
{%- for message in messages %}<|{{ message.role }}|>
{% set content = message.content %}
{%- if message.reasoning_content %}<think>
{{ message.reasoning_content }}
</think>

{% elif message.role == 'assistant' and '</think>' in content %}\
{% set content = content.split('</think>')[-1] %}
{%- endif %}{{ content }}<|end|>
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% elif open_thoughts is defined %}<think>
{% endif %}{% endif %}"""

PLAIN = """\
{%- for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""

MARKS = {
    "hermes": [],
    "llama-json": ["<|python_tag|>"],
    "llama-pythonic": [],
    "mistral": ["[TOOL_CALLS]", "[INST]", "[/INST]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"],
    "deepseek-v3": [
        f"<｜tool▁{name}｜>" for name in ("calls▁begin", "calls▁end", "call▁begin", "call▁end", "sep")
    ],
    "thinking": ["<think>", "</think>"],
    "plain": [],
}
TEMPLATES = {
    "hermes": HERMES,
    "llama-json": LLAMA_JSON,
    "llama-pythonic": LLAMA_PYTHONIC,
    "mistral": MISTRAL,
    "deepseek-v3": DEEPSEEK,
    "thinking": THINKING,
    "plain": PLAIN,
}


def make_chat_model(directory: Path, name: str) -> Path:
    """A model directory with the template of that name, to whose tokenizer its marks are control tokens."""
    directory.mkdir(exist_ok=True)
    make_model_dir(directory)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in MARKS[name]])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config["chat_template"] = TEMPLATES[name]
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@dataclass(kw_only=True)
class Scripted(FakeGroup):
    """Says `texts`, one after another, one for each sequence; the last one again and again."""

    tokenizer: Tokenizer
    texts: list[str] = field(default_factory=list)

    async def generate(self, request: Generate, take: Take | None = None) -> AsyncIterator[list[TokenDelta]]:
        text = self.texts[min(len(self.requests), len(self.texts) - 1)]
        self.says = self.tokenizer.encode(text, add_special_tokens=False).ids
        async for batch in super().generate(request):
            yield batch

    def prompt(self, number: int = -1) -> str:
        """The text of a prompt that came, control tokens and all."""
        return self.tokenizer.decode(self.requests[number].prompt_ids, skip_special_tokens=False)


def scripted(directory: Path, *texts: str, **options: object) -> Scripted:
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    return Scripted(
        says=[],
        eos_id=tokenizer.token_to_id("<|end|>"),
        tokenizer=tokenizer,
        texts=list(texts),
        **{"info": ready(tokenizer.get_vocab_size(), max_model_len=4096), **options},
    )


def make_chat_app(directory: Path, *groups: FakeGroup) -> FastAPI:
    return create_app(Settings(), [make_served(directory, *groups)])


@contextmanager
def serving_chat(directory: Path, *groups: FakeGroup) -> Iterator[str]:
    """The API's address, on a socket."""
    with listening(make_chat_app(directory, *groups)) as url:
        yield f"{url}/v1"
