"""Options of a command from the fields of dataclasses, where name, default, bounds and help are said once."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

_META = "flag"
_SEVERAL = " In the variable: with spaces between."


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Flag:
    help: str
    low: float | None
    high: float | None
    choices: tuple[str, ...]
    name: str
    if_blank: str


def flag(
    default: Any,
    help: str = "",
    *,
    low: float | None = None,
    high: float | None = None,
    choices: Iterable[str] = (),
    name: str = "",
    if_blank: str = "",
) -> Any:
    """A field that is an option of the command line, and a variable of the environment: SLUICE_ and its name.
    `low` and `high` are allowed. A tuple may be given piece by piece: `name` says what one is called.
    A variable that is set to nothing counts as not set, unless `if_blank` says what to do about it."""
    told = _Flag(help=help, low=low, high=high, choices=tuple(choices), name=name, if_blank=if_blank)
    return dataclasses.field(default=default, metadata={_META: told})


def parameters(*classes: type) -> list[inspect.Parameter]:
    """The options of the fields of dataclasses, for the signature of a typer command."""
    return [_parameter(field, hint) for cls in classes for field, hint in _own_flags(cls)]


def given_to(cls: type, given: dict[str, Any]) -> dict[str, Any]:
    """What was given of a dataclass's flags, its bases' among them, as its constructor takes it.

    Raises ValueError where a variable is blank that must not be."""
    for field in dataclasses.fields(cls):
        told: _Flag | None = field.metadata.get(_META)
        if told is not None and told.if_blank and not given[field.name]:
            _check_not_blank(_variable(field), told.if_blank)
    chosen = {each.name: given[each.name] for each in dataclasses.fields(cls) if _META in each.metadata}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in chosen.items()}


def _own_flags(cls: type) -> Iterator[tuple[dataclasses.Field[Any], Any]]:
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if _META in field.metadata and field.name in inspect.get_annotations(cls):
            yield field, hints[field.name]


def _parameter(field: dataclasses.Field[Any], hint: Any) -> inspect.Parameter:
    import typer

    told: _Flag = field.metadata[_META]
    asked: Any = Literal[told.choices] if told.choices else _piece(hint)
    name = told.name or field.name
    option = typer.Option(
        _spelling(name, field.default),
        min=told.low,
        max=told.high,
        envvar=_variable(field),
        help=(told.help + _SEVERAL if isinstance(field.default, tuple) else told.help) or None,
    )
    if isinstance(field.default, tuple):
        asked = list[asked]
    if field.default is None:
        asked |= None
    default = list(field.default) if isinstance(field.default, tuple) else field.default
    keyword = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(field.name, keyword, default=default, annotation=Annotated[asked, option])


def _variable(field: dataclasses.Field[Any]) -> str:
    return f"SLUICE_{(field.metadata[_META].name or field.name).upper()}"


def _check_not_blank(variable: str, remedy: str) -> None:
    if variable in os.environ and not os.environ[variable].strip():
        raise ValueError(f"{variable}: is set, but to nothing, as a secret that was not found is: {remedy}")


def _piece(hint: Any) -> Any:
    """The type of one value: X of `X | None` and of `tuple[X, ...]`."""
    if get_origin(hint) is Literal:
        return hint
    [piece] = [each for each in get_args(hint) or (hint,) if each not in (type(None), ...)]
    return piece


def _spelling(name: str, default: object) -> str:
    option = name.replace("_", "-")
    return f"--{option}/--no-{option}" if default is True else f"--{option}"
