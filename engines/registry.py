"""Which engines there are: a name to "module:Class", imported when chosen.

Ours stand here, one line each; those of other distributions come by entry points of the group
`sluice.engines`. Torch-free itself: asking for names loads nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

GROUP = "sluice.engines"
Sizes = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Ours:
    """An engine, and what is to be known of it before it is imported, which may take seconds."""

    target: str  # "module:Class"
    parallel_types: tuple[str, ...] = ()  # that it can do; (): any
    is_static: bool = False  # its class says batching = "static"
    parity: Sizes = ((1, 1),)  # (tp, pp) that `sluice parity` compares


ENGINES = {
    "native": Ours("engines.native:NativeEngine", ("tp",), parity=((1, 1), (2, 1), (4, 1))),
    "pipeline": Ours("engines.pipeline:PipelineEngine", ("pp", "pptp"), parity=((1, 2), (1, 4), (2, 2))),
    "accelerate": Ours("engines.accelerate_map:AccelerateEngine", ("custom",)),
    "deepspeed_tp": Ours("engines.deepspeed_tp:DeepSpeedTPEngine", ("tp",), parity=((1, 1), (2, 1), (4, 1))),
    "deepspeed_inject": Ours("engines.deepspeed_inject:DeepSpeedInjectEngine", ("tp",), is_static=True),
}


class UnknownEngine(ValueError):  # noqa: N818  it names a thing that is not there
    """No engine of that name here. The message names those there are."""


def names() -> tuple[str, ...]:
    """Every engine that `load` can be asked for: ours, then the plug-ins by name."""
    return (*ENGINES, *sorted(point.name for point in _plugins() if point.name not in ENGINES))


def is_static(name: str) -> bool:
    """Whether it is known without importing it to batch statically. Plug-ins say so when they are loaded."""
    return name in ENGINES and ENGINES[name].is_static


def check(name: str) -> None:
    """Raise UnknownEngine unless there is an engine of that name."""
    if name in names():
        return
    match = get_close_matches(name, names(), n=1)
    near = f"did you mean {match[0]!r}? " if match else ""
    raise UnknownEngine(
        f"engine {name!r} is not in this version of Sluice; {near}there are: {', '.join(names())}; "
        f"remedy: name one of them (`engine:`), or install the plug-in that offers it (entry points, {GROUP})"
    )


def load(name: str) -> type[Any]:
    """The engine's class, an implementation of `engines.base.Engine`; imports its module.

    Raises UnknownEngine, and ImportError when the module or its dependencies are missing."""
    check(name)
    if name in ENGINES:
        module, _, attribute = ENGINES[name].target.partition(":")
        engine = getattr(import_module(module), attribute)
    else:
        engine = next(point for point in _plugins() if point.name == name).load()
    assert isinstance(engine, type), f"engine {name!r} is not a class"
    return engine


def _plugins() -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=GROUP))
