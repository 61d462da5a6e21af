"""Functions that a model may call, and whether it shall: OpenAI's tools, and the older functions as tools."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from gateway.protocol import bounds, fields
from gateway.protocol.common import InvalidField, RequestPart

_Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


def _only_functions(value: object) -> object:
    """Tools of other kinds are refused with a message of their own."""
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(kind, str) and kind not in ("function", "allowed_tools"):
        raise ValueError(f"only tools of type 'function' are supported, not {kind[:40]!r}")
    return value


class FunctionDefinition(RequestPart):
    name: _Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class _Tool(RequestPart):
    rules = fields.TOOL

    type: Literal["function"]
    function: FunctionDefinition


class _FunctionName(RequestPart):
    name: _Name


class _NamedTool(RequestPart):
    type: Literal["function"]
    function: _FunctionName


class _AllowedTools(RequestPart):
    mode: Literal["auto", "required"]
    tools: Annotated[
        list[Annotated[_NamedTool, BeforeValidator(_only_functions)]],
        Field(min_length=1, max_length=bounds.MAX_TOOLS, fail_fast=True),
    ]


class _ToolChoice(RequestPart):
    rules = fields.TOOL_CHOICE

    type: Literal["function", "allowed_tools"]
    function: _FunctionName | None = None
    allowed_tools: _AllowedTools | None = None


def _as_choice(value: object) -> object:
    if isinstance(value, str):
        if value not in ("none", "auto", "required"):
            raise ValueError("expected 'none', 'auto', 'required' or an object that names a function")
        return value
    if isinstance(value, dict):
        kind = _only_functions(value) and value.get("type")
        if kind in ("function", "allowed_tools") and value.get(str(kind)) is None:
            raise ValueError(f"a tool_choice of type '{kind}' needs '{kind}'")
    return value


Tools = Annotated[
    list[Annotated[_Tool, BeforeValidator(_only_functions)]],
    Field(max_length=bounds.MAX_TOOLS, fail_fast=True),
]
ToolChoice = Annotated[Literal["none", "auto", "required"] | _ToolChoice, BeforeValidator(_as_choice)]
Functions = Annotated[list[FunctionDefinition], Field(max_length=bounds.MAX_TOOLS, fail_fast=True)]
FunctionChoice = Literal["none", "auto"] | _FunctionName


@dataclass(frozen=True, slots=True)
class ToolUse:
    """What a request says of tools: `functions` are shown to the model, `allowed` are those it may call."""

    functions: tuple[FunctionDefinition, ...] = ()
    allowed: tuple[FunctionDefinition, ...] = ()
    is_required: bool = False
    is_parallel: bool = True
    is_legacy: bool = False  # functions, not tools: at most one is called, and told in the older shape

    @property
    def param(self) -> str:
        """The field that names the functions."""
        return "functions" if self.is_legacy else "tools"

    @property
    def choice_param(self) -> str:
        return "function_call" if self.is_legacy else "tool_choice"

    @property
    def is_constrained(self) -> bool:
        """Whether the answer needs a grammar: else the model writes calls as it has learned to."""
        is_part = len(self.allowed) < len(self.functions)
        is_strict = any(function.strict for function in self.allowed)
        return bool(self.allowed) and (self.is_required or is_part or is_strict or not self.is_parallel)


def use_of_tools(
    tools: Tools | None,
    choice: ToolChoice | None,
    functions: Functions | None,
    called: FunctionChoice | None,
    is_parallel: bool | None,
) -> ToolUse:
    """What comes of the five fields. Raises InvalidField."""
    if tools and functions:
        raise InvalidField("functions", "'functions' is the older form of 'tools': give one of them")
    if functions or called not in (None, "none", "auto"):
        mode, names = _of_function_choice(called)
        all_of_them = ToolUse(tuple(functions or ()), is_parallel=False, is_legacy=True)
    else:
        mode, names = _of_tool_choice(choice)
        definitions = tuple(tool.function for tool in tools or ())
        all_of_them = ToolUse(definitions, is_parallel=is_parallel is not False)
    return chosen(all_of_them, mode, names)


def _of_tool_choice(choice: ToolChoice | None) -> tuple[str, list[str] | None]:
    """The mode, and the names of those that may be called; None: all."""
    if choice is None or isinstance(choice, str):
        return choice or "auto", None
    if choice.allowed_tools is not None and choice.type == "allowed_tools":
        return choice.allowed_tools.mode, [tool.function.name for tool in choice.allowed_tools.tools]
    assert choice.function is not None, "the validator has seen to it"
    return "required", [choice.function.name]


def _of_function_choice(choice: FunctionChoice | None) -> tuple[str, list[str] | None]:
    if choice is None or isinstance(choice, str):
        return choice or "auto", None
    return "required", [choice.name]


def chosen(use: ToolUse, mode: str, names: list[str] | None) -> ToolUse:
    """With what may be called of it: `mode` is none, auto or required; `names` are those that may be called,
    None: all. Raises InvalidField."""
    by_name = {function.name: function for function in use.functions}
    if len(by_name) < len(use.functions):
        raise InvalidField(use.param, f"'{use.param}' has two functions of one name")
    if not by_name and mode != "none" and (mode == "required" or names is not None):
        raise InvalidField(
            use.choice_param, f"'{use.choice_param}' is only allowed when '{use.param}' are specified."
        )
    if mode == "none":
        return ToolUse(is_legacy=use.is_legacy)
    if unknown := [name for name in names or () if name not in by_name]:
        raise InvalidField(
            use.choice_param,
            f"'{use.choice_param}' names the function {unknown[0]!r}, which is not in '{use.param}'",
        )
    allowed = use.functions if names is None else tuple(by_name[name] for name in dict.fromkeys(names))
    return replace(use, allowed=allowed, is_required=mode == "required")
