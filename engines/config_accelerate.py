"""`deviceMap` and `maxMemory`: where engine accelerate puts modules, and how much a device may hold."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeVar

from engines.config import DeviceMap, MaxMemory
from engines.config_errors import nearest
from engines.config_read import Settings, parse_bytes
from engines.config_source import Section, Value, describe

POLICIES = ("auto", "balanced", "balanced_low_0", "sequential")

_DEVICE = re.compile(r"cpu|disk|cuda:\d{1,3}")
_NUMBER = re.compile(r"\d{1,3}")  # Hugging Face's own spelling of a CUDA device
_DEVICES = "cpu, disk, cuda:0 (or 0), cuda:1, ..."
_HOLDERS = "cpu, cuda:0 (or 0), cuda:1, ..."
T = TypeVar("T")


def read_device_map(s: Settings, key: str) -> DeviceMap:
    """A policy, or module names with the device of each; `cpu` alone is a map of the whole model."""
    given = s.values.get(key, "auto")
    if isinstance(given, Section):
        return tuple(_entries(s, key, given, _device))
    if given in POLICIES:
        return str(given)
    if device := _name(given):
        return (("", device),)
    allowed = f"{', '.join(POLICIES)}, one of {_DEVICES}, or a mapping of module names to these"
    near = nearest(given, POLICIES) if isinstance(given, str) else ""
    s.problem(
        key,
        f"is {describe(Value(given, ''))}",
        allowed=allowed,
        near=near,
        remedy=f"write `{near or 'auto'}`",
    )
    return "auto"


def read_max_memory(s: Settings, key: str) -> MaxMemory:
    """Bytes of weights that each device may hold."""
    given = s.values.get(key)
    if isinstance(given, Section):
        sizes = _entries(s, key, given, _holder)
        named = [(_name(device) or device, size) for device, size in sizes]
        if len(dict(named)) < len(named):
            s.problem(key, "names a device twice (0 is cuda:0)", remedy="keep one of them")
        return tuple(named)
    if key in s.values:
        s.problem(
            key,
            f"is {describe(Value(given, ''))}",
            allowed=f"a mapping of {_HOLDERS} to sizes",
            remedy='write `cpu: "8GiB"` indented under it',
        )
    return ()


class _Wrong(Exception):  # noqa: N818  an entry, not a failure
    def __init__(self, wrong: str, allowed: str) -> None:
        super().__init__(wrong)
        self.allowed = allowed


def _entries(
    s: Settings, key: str, section: Section, parse: Callable[[str, Value], T]
) -> list[tuple[str, T]]:
    parsed = []
    for name, node in section.entries.items():
        path = f"{key}.{name}"
        s.places[path] = node.where
        try:
            if not isinstance(node, Value):
                raise _Wrong(f"is {describe(node)}", "one value")
            parsed.append((name, parse(name, node)))
        except _Wrong as wrong:
            s.problem(path, str(wrong), allowed=wrong.allowed, remedy="correct this entry")
    return parsed


def _device(_: str, node: Value) -> str:
    if device := _name(node.value):
        return device
    raise _Wrong(f"is {describe(node)}", _DEVICES)


def _holder(name: str, node: Value) -> int:
    if _name(name) in (None, "disk"):
        raise _Wrong("is not a device whose memory can be bounded", _HOLDERS)
    size = parse_bytes(node)
    if size is None:
        raise _Wrong(f"is {describe(node)}", 'bytes as an integer, or text such as "8GiB"')
    return size


def _name(device: object) -> str | None:
    """The device by the name that we have for it; None: there is none such."""
    text = str(device) if type(device) in (int, str) else ""
    if _NUMBER.fullmatch(text):
        return f"cuda:{int(text)}"
    return text if _DEVICE.fullmatch(text) else None
