"""What becomes of every request field: supported, ignored with a reason, or refused with a reason.

A field that is in neither table nor model is refused as unknown. A refused field passes at a value
that asks for nothing (`no_op`), because clients send those without meaning it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Literal, NamedTuple

_NOT_YET = "in this version"
_TEXT_ONLY = "the models read text only"
_FUNCTIONS_ONLY = "only tools of type 'function' are supported"


class Rule(NamedTuple):
    status: Literal["ignored", "refused"]
    why: str
    no_op: tuple[object, ...] = ()  # None passes always

    def json_schema(self) -> dict[str, object]:
        """What passes."""
        remark = f"{self.status.capitalize()}: {self.why}"
        if self.status == "ignored":
            return {"description": remark}
        return {"description": remark, "enum": [None, *self.no_op]}


_MAX_FIELD_NAME = 64
"""Longer ones are compared with nothing: whoever sends them means none of ours."""


class UnknownField(ValueError):  # noqa: N818
    """A field that this endpoint does not know; `known`: those that it does."""

    def __init__(self, field: str, known: Iterable[str] = ()) -> None:
        alike = get_close_matches(field, known, n=1) if len(field) <= _MAX_FIELD_NAME else []
        hint = f" (did you mean '{alike[0]}'?)" if alike else ""
        super().__init__(f"Unrecognized request argument supplied: {field}{hint}")

    def inside(self, place: str) -> UnknownField:
        """It, told of the part of the request that has this place; empty: of the request itself."""
        if place:
            self.args = (f"{self}, in '{place}'",)
        return self


class UnsupportedField(ValueError):  # noqa: N818
    """A known field that is refused."""

    def __init__(self, field: str, why: str) -> None:
        reason = f" {why}" if why == _NOT_YET else f": {why}"
        super().__init__(f"'{field}' is not supported{reason}")
        self.param = field


def _ignored(why: str) -> Rule:
    return Rule("ignored", why)


def _refused(why: str, *no_op: object) -> Rule:
    return Rule("refused", why, no_op)


SHARED = {
    "user": _ignored("a label for the caller's own use"),
    "skip_special_tokens": _refused("control tokens are never shown", True),
    "spaces_between_special_tokens": _refused("control tokens are never shown", True, False),
    "guided_decoding_backend": _ignored("there is one, llguidance"),
    "guided_whitespace_pattern": _refused("white space in JSON is as much as indents need"),
    "use_beam_search": _refused(_NOT_YET, False),
    "length_penalty": _refused("it belongs to beam search", 1),
    "priority": _refused(_NOT_YET, 0),
}

CHAT = SHARED | {
    "truncate_prompt_tokens": _refused("a conversation is served whole or refused"),
    "prompt_logprobs": _refused("/v1/completions has them"),
    "best_of": _refused("/v1/completions has it", 1),
    "metadata": _ignored("it labels stored completions, and nothing is stored"),
    "safety_identifier": _ignored("a label for the caller's own use"),
    "prompt_cache_retention": _ignored("a hint; the prefix cache keeps what fits in memory"),
    "prompt_cache_options": _ignored("a hint; the prefix cache keeps what fits in memory"),
    "prediction": _ignored("a hint for speed that never changes the answer"),
    "service_tier": _ignored("there is one tier"),
    "store": _refused("nothing is stored", False),
    "verbosity": _refused("models write as they have learned to: ask for it in a message", "medium"),
    "modalities": _refused("the models write text only", ["text"]),
    "audio": _refused("the models write text only"),
    "web_search_options": _refused("the server does not search"),
    "moderation": _refused("the server does not moderate"),
    "echo": _refused("the prompt is the template's", False),
    "add_special_tokens": _refused("the chat template writes them", False),
    "chat_template": _refused("only the server chooses the template"),
}

COMPLETIONS = SHARED

EMBEDDINGS = {
    "user": SHARED["user"],
    "normalize": _refused("every vector has length 1", True),
    "priority": SHARED["priority"],
}

TOKENIZE = {
    "chat_template": _refused("only the server chooses the template"),
    "mm_processor_kwargs": _refused(_TEXT_ONLY, {}),
}

DETOKENIZE: dict[str, Rule] = {}

MESSAGE = {
    "audio": _refused(_TEXT_ONLY),
    "annotations": _refused(_TEXT_ONLY, []),
    "parsed": _ignored("OpenAI's SDK adds it to messages that it has read"),
}

FUNCTION_CALL = {
    "parsed_arguments": _ignored("OpenAI's SDK adds it to calls that it has read"),
}

TOOL_CALL = {
    "index": _ignored("it belongs to the chunks of a stream, which some clients put together so"),
    "custom": _refused(_FUNCTIONS_ONLY),
}

TOOL = {
    "custom": _refused(_FUNCTIONS_ONLY),
}

TEXT_PART = {
    "image_url": _refused(_TEXT_ONLY),
    "input_audio": _refused(_TEXT_ONLY),
    "file": _refused(_TEXT_ONLY),
    "prompt_cache_breakpoint": _ignored("a hint; the prefix cache finds every shared prefix itself"),
}

TOOL_CHOICE = {
    "custom": _refused(_FUNCTIONS_ONLY),
}

STRUCTURED_OUTPUTS = {
    "disable_fallback": _ignored("nothing is fallen back to"),
    "disable_any_whitespace": _refused("white space in JSON is as much as indents need", False),
    "disable_additional_properties": _refused("the schema says it", False),
    "whitespace_pattern": _refused("white space in JSON is as much as indents need"),
    "structural_tag": _refused("write it as a grammar"),
}

STREAM_OPTIONS = {
    "include_obfuscation": _ignored("padding against traffic analysis is not written"),
}


def without_unused(
    given: Mapping[str, object], rules: Mapping[str, Rule], supported: frozenset[str]
) -> dict[str, object]:
    """The supported fields of a request. Raises UnknownField and UnsupportedField."""
    kept: dict[str, object] = {}
    for name, value in given.items():
        if name in supported:
            kept[name] = value
        elif (rule := rules.get(name)) is None:
            raise UnknownField(name, supported)
        elif rule.status == "refused" and value is not None and not _is_among(value, rule.no_op):
            raise UnsupportedField(name, rule.why)
    return kept


def _is_among(value: object, allowed: tuple[object, ...]) -> bool:
    """Equality that tells True from 1."""
    return any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in allowed)
