"""docs/configuration.md: every key of a model-config.yaml and every option of `sluice serve`, read from the
schema and the dataclasses that the program itself goes by. `python -m gateway.reference` writes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from engines import config_deepspeed
from engines.config_help import GROUPS, HELP, Help
from engines.config_schema import FRONTEND, SECTIONS, TOP, Key, Kind
from gateway import flags
from gateway.options import ModelFlags, Options
from gateway.settings import Settings

KEYS = TOP | {f"{section}.{name}": key for section, keys in SECTIONS.items() for name, key in keys.items()}
"""Of the whole file; those in sections with a dot."""

_HEAD = """\
# model-config.yaml and `sluice serve`

Every key and every option. Written by `python -m gateway.reference` from the code that reads them.

`sluice serve FILE` serves a file; `sluice check FILE` shows what its keys come to and starts nothing. A key
with a dot is in a section: `torchrun.nproc-per-node` is `nproc-per-node:`, indented under `torchrun:`. What
is wrong in a file is refused with its line, an unknown key, too; only under `handler:`, where handlers had
keys of their own, one that is not just a slip is a warning.

TorchServe's keys that act: {torchserve}, `deepspeed.config`, `handler.model_path`. Of its meaning
`responseTimeout` has changed: it is the silence between tokens here, not the time of a whole answer.
"""
_TIME = """\
No key bounds the time of a whole request. Bounded are its parts: its arrival (`--receive-timeout`), its wait
in the gateway (`--queue-timeout`, then 503), the silence of the group that has it (`responseTimeout`, then
504), the search for another group when its own has died (`--recovery-wait`), its length (`max_tokens`,
`maxModelLen`) and a client that reads nothing (`--send-timeout`). A client that closes its connection ends
its request: its own timeout is the total deadline.
"""
_SAMPLING = """\
## Sampling

No key says how tokens are drawn: requests do. Where they don't, `temperature` and `top_p` are 1, and there is
no `top_k` and no penalty; of the model's generation_config.json only the end tokens are read.
"""
_IGNORED = """\
## Accepted, without effect

A warning at the start names the line and says why. A value of the wrong type is an error all the same.
"""
_REFUSED = """\
## Refused

Another value than those accepted would change what users get, and is an error.
"""
_DEEPSPEED = """\
## The DeepSpeed file

Of the JSON file that `deepspeed.config` names, these act: {acting}. These have no effect (a warning):
{ignored}. These are accepted only with values that change nothing: {fixed}. These are refused: {refused}.
"""
_SERVE = """\
## `sluice serve`

Its arguments (or `SLUICE_MODELS`) are the models. Each option is a variable of the environment, too:
`--max-model-len` is `SLUICE_MAX_MODEL_LEN`.
"""
_OPTIONS = {
    "Of every model, in place of what its file says": ModelFlags,
    "Of the server": Options,
    "Of HTTP": Settings,
}
_TYPES = {int: "an integer", float: "a number", str: "text", Path: "a path", bool: ""}


def markdown() -> str:
    """docs/configuration.md."""
    return "\n".join(_lines())


def _lines() -> Iterator[str]:
    own = [name for name in HELP if name in FRONTEND or name.startswith(("torchrun.", "pippy."))]
    yield _HEAD.format(torchserve=_code(own))
    for title, group in GROUPS.items():
        yield from _table(f"## {title}\n", ("key", "value", "without it", ""), map(_key, group.items()))
        if title == "Waiting and time":
            yield _TIME
    yield _SAMPLING
    ignored = ((f"`{name}`", key.ignored) for name, key in KEYS.items() if key.ignored)
    yield from _table(_IGNORED, ("key", "why"), ignored)
    refused = (
        (f"`{name}`", _code(map(yaml, key.harmless)), key.refused, key.remedy)
        for name, key in KEYS.items()
        if key.refused
    )
    yield from _table(_REFUSED, ("key", "accepted", "why", "instead"), refused)
    yield _DEEPSPEED.format(
        acting=_code(config_deepspeed.READ),
        ignored=_code(config_deepspeed.IGNORED),
        fixed=_code(config_deepspeed.FIXED),
        refused=_code(config_deepspeed.REFUSED),
    )
    yield _SERVE
    for title, cls in _OPTIONS.items():
        yield from _table(f"### {title}\n", ("option", "value", "without it", ""), _options(cls))


def _table(title: str, head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    yield title
    yield f"| {' | '.join(head)} |"
    yield "|---" * len(head) + "|"
    yield from (f"| {' | '.join(row)} |" for row in rows)
    yield ""


def _key(item: tuple[str, Help]) -> tuple[str, ...]:
    name, help = item
    default = "" if help.default is None else f"`{yaml(help.default)}`"
    return f"`{name}`", _value(KEYS[name]), ": ".join(filter(None, (default, help.otherwise))), help.text


def _value(key: Key) -> str:
    """What may be written. What is read by more than its type says so itself."""
    return "" if key.kind is Kind.ANY else key.allowed()


def yaml(value: object) -> str:
    """As a file has it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else _plain(value)


def _plain(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _options(cls: type) -> Iterator[tuple[str, ...]]:
    for parameter in flags.parameters(cls):
        asked, option = get_args(parameter.annotation)
        name = option.envvar.removeprefix("SLUICE_").lower().replace("_", "-")
        default = "" if parameter.default in (None, []) else f"`{yaml(parameter.default)}`"
        is_on = parameter.default is True
        yield (
            f"`--{name}`, `--no-{name}`" if is_on else f"`--{name}`",
            _asked(asked, option.min, option.max),
            default,
            option.help or "",
        )


def _asked(asked: Any, low: float | None, high: float | None) -> str:
    """The value of an option, in words."""
    if get_origin(asked) is Literal:
        return ", ".join(map(str, get_args(asked)))
    if inner := [each for each in get_args(asked) if each is not type(None)]:
        return _asked(inner[0], low, high)
    if low is None:
        return _TYPES[asked]
    return f"{_TYPES[asked]}, {low:g} {f'to {high:g}' if high is not None else 'or more'}"


def _code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def main() -> None:
    """Writes it."""
    (Path(__file__).parents[1] / "docs" / "configuration.md").write_text(markdown())


if __name__ == "__main__":
    main()
