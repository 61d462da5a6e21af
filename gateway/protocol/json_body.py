"""A request's body from bytes to a JSON object, bounded before it is parsed.

A few bytes of JSON can stand for much memory, or for more nesting than what comes after can follow; so what
the parser would build is counted first, at the speed of a search in bytes.
"""

from __future__ import annotations

import re
from itertools import accumulate

import pydantic_core

MAX_DEPTH = 64
MAX_CONTAINERS = 65_536
MAX_KEYS = 65_536
MAX_STRINGS = 262_144  # keys are strings, too
MAX_VALUES = 2_097_152  # in lists and objects: token ids are the many ones
MAX_DIGITS = 100  # in a row: whole numbers take time by the square of their length

_STEPS = bytes.maketrans(b"[{]}", bytes([2, 2, 0, 0]))  # one more than what each adds to the depth
_NO_BRACKETS = bytes(set(range(256)) - set(b"[{]}"))
_LONG_NUMBER = re.compile(rb"(?<![0-9])[0-9]{%d}" % (MAX_DIGITS + 1))  # looked for once a run: linear


class MalformedBody(ValueError):  # noqa: N818
    """The body is not a JSON object, or not one that a request could be."""


def parse_object(body: bytes) -> dict[str, object]:
    """The object. Raises MalformedBody: for all that is not JSON, NaN and infinity among it, for a key that
    is twice in one object, and for what is beyond the limits above."""
    structure = _structure(body)
    _check(structure)
    try:
        # By default pydantic keeps thousands of short strings for all time: people's prompts among them.
        content = pydantic_core.from_json(body, allow_inf_nan=False, cache_strings="none")
    except ValueError as error:
        raise MalformedBody(f"The body is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise MalformedBody("The body must be a JSON object")
    if _num_keys(content, is_flat=structure.count(b"{") == 1) != structure.count(b":"):
        raise MalformedBody("The body has a key twice in one object")
    return content


def _structure(body: bytes) -> bytes:
    """The body without its strings. Exact up to the first byte that is no JSON, and the parser gets no
    further than that either. A quote belongs to a string when an odd number of backslashes is before it."""
    unescaped = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    if unescaped.count(b'"') > 2 * MAX_STRINGS:
        raise MalformedBody(f"The body has more than {MAX_STRINGS} strings")
    return b"".join(unescaped.split(b'"')[::2])


def _check(structure: bytes) -> None:
    num_containers = structure.count(b"[") + structure.count(b"{")
    for count, limit, what in (
        (num_containers, MAX_CONTAINERS, "lists and objects"),
        (structure.count(b":"), MAX_KEYS, "keys"),
        (structure.count(b","), MAX_VALUES, "values"),
    ):
        if count > limit:
            raise MalformedBody(f"The body has more than {limit} {what}")
    if num_containers > MAX_DEPTH and _depth(structure) > MAX_DEPTH:
        raise MalformedBody(f"The body is nested more than {MAX_DEPTH} levels deep")
    if _LONG_NUMBER.search(structure):
        raise MalformedBody(f"The body has a number of more than {MAX_DIGITS} digits")


def _depth(structure: bytes) -> int:
    steps = structure.translate(_STEPS, _NO_BRACKETS)
    return max(accumulate(step - 1 for step in steps))


def _num_keys(content: dict[str, object], *, is_flat: bool) -> int:
    """Of all objects in it. `is_flat`: there is no other."""
    if is_flat:
        return len(content)
    num_keys = 0
    pending: list[object] = [content]
    while pending:
        container = pending.pop()
        if isinstance(container, dict):
            num_keys += len(container)
            pending += [value for value in container.values() if isinstance(value, dict | list)]
        elif isinstance(container, list):
            pending += [value for value in container if isinstance(value, dict | list)]
    return num_keys
