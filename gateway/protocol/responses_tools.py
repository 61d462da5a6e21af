"""Functions as POST /v1/responses has them: without the object that chats wrap around each."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from gateway.protocol import bounds, responses_fields
from gateway.protocol.common import InvalidField, RequestPart
from gateway.protocol.tools import FunctionDefinition, ToolUse, chosen

_Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
_MODES = ("none", "auto", "required")


def _only_functions(value: object) -> object:
    """Tools of other kinds are refused with a message of their own."""
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(kind, str) and kind not in ("function", "allowed_tools"):
        raise ValueError(f"only tools of type 'function' are supported, not {kind[:40]!r}")
    return value


class FunctionTool(RequestPart):
    """Strict where it says so: OpenAI's default would change a schema, or drop the wish in silence."""

    rules = responses_fields.TOOL

    type: Literal["function"]
    name: _Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @property
    def definition(self) -> FunctionDefinition:
        return FunctionDefinition(
            name=self.name, description=self.description, parameters=self.parameters, strict=self.strict
        )


class _Function(RequestPart):
    type: Literal["function"]
    name: _Name


class _Choice(RequestPart):
    type: Literal["function", "allowed_tools"]
    name: _Name | None = None
    mode: Literal["auto", "required"] | None = None
    tools: (
        Annotated[
            list[Annotated[_Function, BeforeValidator(_only_functions, json_schema_input_type=_Function)]],
            Field(min_length=1, max_length=bounds.MAX_TOOLS, fail_fast=True),
        ]
        | None
    ) = None


_NEEDS = {"function": ("name",), "allowed_tools": ("mode", "tools")}


def _as_choice(value: object) -> object:
    if isinstance(value, str):
        if value not in _MODES:
            raise ValueError("expected 'none', 'auto', 'required' or an object that names a function")
        return value
    if isinstance(value, dict):
        _only_functions(value)
        needs = _NEEDS.get(str(value.get("type")), ())
        if missing := [field for field in needs if value.get(field) is None]:
            raise ValueError(f"a tool_choice of type '{value['type']}' needs '{missing[0]}'")
    return value


_Mode = Literal["none", "auto", "required"]
Choice = Annotated[_Mode | _Choice, BeforeValidator(_as_choice, json_schema_input_type=_Mode | _Choice)]
Tools = Annotated[
    list[Annotated[FunctionTool, BeforeValidator(_only_functions, json_schema_input_type=FunctionTool)]],
    Field(max_length=bounds.MAX_TOOLS, fail_fast=True),
]


def use_of_tools(tools: Tools | None, choice: Choice | None, is_parallel: bool | None) -> ToolUse:
    """What comes of the three fields. Raises InvalidField."""
    functions = tuple(tool.definition for tool in tools or ())
    return chosen(ToolUse(functions, is_parallel=is_parallel is not False), *_wanted(choice))


def _wanted(choice: Choice | None) -> tuple[str, list[str] | None]:
    """The mode, and the names of those that may be called; None: all. Raises InvalidField."""
    if choice is None or isinstance(choice, str):
        return choice or "auto", None
    extra = {"name", "mode", "tools"} - {*_NEEDS[choice.type]}
    for field in sorted(extra):
        if getattr(choice, field) is not None:
            param = f"tool_choice.{field}"
            raise InvalidField(param, f"A tool_choice of type '{choice.type}' has no '{field}'.")
    if choice.type == "allowed_tools":
        return choice.mode or "auto", [function.name for function in choice.tools or ()]
    return "required", [choice.name or ""]
