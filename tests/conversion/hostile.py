"""Pickles that would run something, and shards with bytes changed: what the readers must refuse, unharmed."""

from __future__ import annotations

import io
import pickle
import random
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

CANARY = "ran"


class Calls:
    """Pickles as a call of `function`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def by_name(module: str, name: str, *arguments: bytes) -> bytes:
    """A pickle that calls module.name(*arguments), each argument a text."""
    texts = b"".join(b"X" + struct.pack("<I", len(text)) + text for text in arguments)
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"(" + texts + b"tR."


def payloads(canary: Path) -> Iterator[tuple[str, bytes]]:
    """(what it is, pickle). Every one that could run would create `canary`."""
    touch = f"touch {canary}".encode()
    python = f"open({str(canary)!r}, 'w')".encode()
    for module, name, argument in (
        ("os", "system", touch),
        ("posix", "system", touch),
        ("nt", "system", touch),
        ("subprocess", "getoutput", touch),
        ("subprocess", "check_output", touch),
        ("subprocess", "Popen", touch),
        ("commands", "getoutput", touch),
        ("pty", "spawn", touch),
        ("builtins", "eval", python),
        ("builtins", "exec", python),
        ("builtins", "compile", python),
        ("builtins", "__import__", b"os"),
        ("builtins", "open", str(canary).encode()),
        ("builtins", "getattr", b"os"),
        ("__builtin__", "eval", python),
        ("__builtin__", "file", str(canary).encode()),
        ("io", "open", str(canary).encode()),
        ("codecs", "open", str(canary).encode()),
        ("pathlib", "Path", str(canary).encode()),
        ("importlib", "import_module", b"os"),
        ("runpy", "run_path", str(canary).encode()),
        ("shutil", "rmtree", str(canary).encode()),
        ("webbrowser", "open", b"file:///"),
        ("pickle", "loads", by_name("os", "system", touch)),
        ("torch", "load", str(canary).encode()),
        ("torch.hub", "load", str(canary).encode()),
        ("torch.serialization", "load", str(canary).encode()),
        ("torch.utils.cpp_extension", "load_inline", python),
        ("torch.jit", "load", str(canary).encode()),
        ("numpy", "load", str(canary).encode()),
        ("operator", "methodcaller", b"system"),
        ("functools", "partial", touch),
        ("socket", "create_connection", b"localhost"),
        ("ctypes", "CDLL", b"libc.so.6"),
    ):
        yield f"{module}.{name}", by_name(module, name, argument)
    yield "a class of our own", pickle.dumps({"w": Calls(open, str(canary), "w")}, protocol=2)
    yield "in a tensor's place", pickle.dumps({"w": [Calls(exec, python.decode())]}, protocol=4)
    yield "not a dictionary", pickle.dumps([1, 2, 3], protocol=2)
    yield "text for a tensor", pickle.dumps({"w": "text"}, protocol=2)
    yield "numbers for names", pickle.dumps({1: 2}, protocol=2)
    yield "nothing", b""
    yield "no end", b"\x80\x02}" + b"(" * 1000
    yield "a deep nest", b"\x80\x02" + b"(" * 100_000 + b"t" * 100_000 + b"."


def as_pth(content: bytes) -> bytes:
    """The zip file that torch.load looks into."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", b"3\n")
    return buffer.getvalue()


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, cut out, doubled or cut off; more often where the structure is."""
    changed = bytearray(data)
    kind = rng.randrange(6)
    if kind == 0:
        return bytes(changed[: rng.randrange(len(changed))])
    if kind == 1:
        at = rng.randrange(len(changed))
        del changed[at : at + rng.randint(1, 64)]
    elif kind == 2:
        at = rng.randrange(len(changed))
        changed[at:at] = changed[at : at + rng.randint(1, 64)]
    for _ in range(rng.choice((1, 1, 4, 32))):
        near = rng.random()
        span = min(len(changed), 4096)
        at = rng.randrange(span) if near < 0.5 else len(changed) - 1 - rng.randrange(span)
        changed[at] = rng.randrange(256)
    return bytes(changed)
