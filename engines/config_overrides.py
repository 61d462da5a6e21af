"""Command-line flags laid over a file's tree, as if they had been written there."""

from __future__ import annotations

from collections.abc import Mapping

from engines.config_schema import SECTIONS, TOP
from engines.config_source import Section, Value

COMMAND_LINE = "command line"

# Of keys that say the same thing, a flag silences what the file says.
_RIVALS = {
    "parallelLevel": ("torchrun.nproc-per-node",),
    "torchrun.nproc-per-node": ("parallelLevel",),
    "minWorkers": ("maxWorkers",),
    "modelPath": ("handler.model_path",),
    "maxModelLen": ("handler.max_seq_len",),
    "maxNumSeqs": ("handler.max_batch_size",),
    "chatTemplate": ("handler.chat_template",),
}


def apply_flags(tree: Section, flags: Mapping[str, object]) -> None:
    """Set each flag that is not None. Names are the file's own keys, in snake_case or not, dotted for
    sections; `tp` and `pp` are the sizes, and choose the parallelType with them."""
    given = {name: value for name, value in flags.items() if value is not None}
    tp, pp = given.pop("tp", None), given.pop("pp", None)
    if tp is not None or pp is not None:
        _apply_sizes(tree, tp, pp)
    for name, value in given.items():
        key = _key_name(name)
        for rival in _RIVALS.get(key, ()):
            _drop(tree, rival)
        _put(tree, key, value)


def _apply_sizes(tree: Section, tp: object, pp: object) -> None:
    for key in ("parallelLevel", "torchrun.nproc-per-node", "tensorParallel", "pipelineParallel"):
        _drop(tree, key)
    sizes = {"tensorParallel": tp, "pipelineParallel": pp}
    split = {key: size for key, size in sizes.items() if size is not None and size != 1}
    kind = "pptp" if len(split) == 2 else "pp" if "pipelineParallel" in split else "tp"
    _put(tree, "parallelType", kind)
    for key, size in (split or {"tensorParallel": 1}).items():
        _put(tree, key, size)


def _key_name(name: str) -> str:
    if "." in name or name in TOP or name in SECTIONS:
        return name
    head, *rest = name.split("_")
    return head + "".join(word.capitalize() for word in rest)


def _put(tree: Section, key: str, value: object) -> None:
    section, _, name = key.rpartition(".")
    if section:
        home = tree.entries.get(section)
        if not isinstance(home, Section):
            home = tree.entries[section] = Section(COMMAND_LINE)
        tree = home
    tree.entries[name] = _node(value)


def _node(value: object) -> Value:
    items = [_node(item) for item in value] if isinstance(value, list | tuple) else value
    return Value(items, COMMAND_LINE)


def _drop(tree: Section, key: str) -> None:
    section, _, name = key.rpartition(".")
    home = tree.entries.get(section) if section else tree
    if isinstance(home, Section):
        home.entries.pop(name, None)
