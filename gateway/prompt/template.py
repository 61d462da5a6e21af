"""The model's chat template: Jinja from the model directory, rendered in a sandbox.

The environment has what Hugging Face's has (loop controls, `tojson`, `raise_exception`,
`strftime_now`, `generation` blocks), so that a template renders the same text here and there.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gateway.prompt.conversation import Conversation
from gateway.prompt.model_files import file_in

MAX_SOURCE_CHARS = 1 << 20
MAX_ADDED_CHARS = 1 << 20
"""What a template may write beyond the messages' own text."""
_SPECIAL_TOKEN_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


class TemplateRefused(ValueError):  # noqa: N818
    """The template cannot render these messages: it said so itself, or failed on them."""


class BadTemplate(ValueError):  # noqa: N818
    """The model's template is not valid Jinja, or its configuration not valid JSON. Names the file."""


class ChatTemplate:
    """A template and the special tokens that it may write."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], origin: str = "chat template") -> None:
        """Only parsed: Jinja computes what is constant when it compiles. Raises BadTemplate."""
        self.source = source
        self.special_tokens = dict(special_tokens)
        if len(source) > MAX_SOURCE_CHARS:
            raise BadTemplate(f"{origin}: the chat template is longer than {MAX_SOURCE_CHARS} characters")
        try:
            tree = _environment().parse(source)
            _check_names(_environment(), tree)
        except jinja2.TemplateSyntaxError as error:
            raise BadTemplate(
                f"{origin}:{error.lineno}: the chat template is not valid: {error.message}"
            ) from error
        except RecursionError as error:
            raise BadTemplate(f"{origin}: the chat template is nested too deep") from error
        self.variables = frozenset(
            node.name for node in tree.find_all(jinja2.nodes.Name) if node.ctx == "load"
        )
        """Names that it reads. A variable that is not among them changes nothing."""

    @cached_property
    def _template(self) -> jinja2.Template:
        return _environment().from_string(self.source)

    def render(self, conversation: Conversation) -> str:
        """The prompt that asks for the next message, or for more of the last one. It may take for ever: see
        Renderer.

        Raises TemplateRefused."""
        if not conversation.continue_final_message:
            return self._render(conversation, conversation.messages)
        # As transformers does it: a tag at the end of the last message, and nothing of the prompt from there
        # on. A template that trims messages takes the tag's own space away, and so shall we.
        tag = f"\ue002{secrets.randbits(64):020d}"
        *others, last = conversation.messages
        last = {**last, "content": f"{last['content']}{tag} "}
        before, found, after = self._render(conversation, [*others, last]).rpartition(tag)
        if not found:
            raise TemplateRefused("the model's chat template leaves the last message out: it cannot go on")
        return before if after.startswith(" ") else before.rstrip()

    def _render(self, conversation: Conversation, messages: Sequence[Mapping[str, object]]) -> str:
        room = MAX_ADDED_CHARS + conversation.num_chars
        pieces: list[str] = []
        try:
            for piece in self._template.generate(
                **conversation.variables,
                messages=[dict(message) for message in messages],
                tools=conversation.tools,
                documents=None,
                add_generation_prompt=conversation.add_generation_prompt,
                **self.special_tokens,
            ):
                pieces.append(piece)
                room -= len(piece)
                if room < 0:
                    raise TemplateRefused(
                        f"the model's chat template adds over {MAX_ADDED_CHARS} characters to these messages"
                    )
            return "".join(pieces)
        except TemplateRefused:
            raise
        except jinja2.TemplateError as error:
            raise TemplateRefused(
                f"the model's chat template refuses these messages: {error.message}"
            ) from error
        except Exception as error:  # a template is a program of somebody else: anything may come
            raise TemplateRefused(
                f"the model's chat template failed on these messages ({type(error).__name__})"
            ) from error


def load_chat_template(model_dir: Path, override: Path | None = None) -> ChatTemplate | None:
    """The template given, or the directory's chat_template.jinja, or that of its tokenizer_config.json.

    None if the model has none. Raises BadTemplate, BadModelFile, OSError.
    """
    config_path = file_in(model_dir, "tokenizer_config.json")
    config = {} if config_path is None else _read_json(config_path)
    special_tokens = _special_tokens(config)
    path = override or file_in(model_dir, "chat_template.jinja")
    if path is not None:
        return ChatTemplate(_read_text(path), special_tokens, str(path))
    source = _default_template(config.get("chat_template"))
    return None if source is None else ChatTemplate(source, special_tokens, str(config_path))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadTemplate(f"{path}: is not UTF-8 text") from error


def _read_json(path: Path) -> dict[str, object]:
    try:
        content = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise BadTemplate(f"{path}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise BadTemplate(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def _default_template(value: object) -> str | None:
    """A template, or the one named "default" of a list of named ones."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        source = named.get("default")
        return source if isinstance(source, str) else None
    return None


def _special_tokens(config: Mapping[str, object]) -> dict[str, str]:
    """bos_token and its kin, each either a string or an object with `content`."""
    tokens: dict[str, str] = {}
    for name in _SPECIAL_TOKEN_NAMES:
        value = config.get(name)
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str):
            tokens[name] = content
    return tokens


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's tokens for training; here it only shows its body."""

    tags = {"generation"}  # noqa: RUF012  jinja2's own declaration

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _check_names(environment: jinja2.Environment, tree: jinja2.nodes.Template) -> None:
    """Raises TemplateSyntaxError for unknown filters and tests."""
    for node in tree.find_all((jinja2.nodes.Filter, jinja2.nodes.Test)):
        kind, known = (
            ("filter", environment.filters)
            if isinstance(node, jinja2.nodes.Filter)
            else ("test", environment.tests)
        )
        if node.name not in known:
            raise jinja2.TemplateSyntaxError(f"there is no {kind} named {node.name!r}", node.lineno)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    functions: dict[str, Callable[[str], str]] = {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
    }
    environment.globals.update(functions)
    return environment


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML, which no model was trained on."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
