"""What a client wants its answer to look like, as a grammar for the engine.

Schemas, regular expressions and grammars are compiled once in a helper process (gateway/grammar_process.py),
which the kernel bounds in time and memory; what cannot be followed is refused. What came of the last ones is
kept.
"""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from hashlib import blake2b
from typing import Literal

from gateway.helper import Helper, HelperKilled
from gateway.protocol.common import GenerationParams, InvalidField
from gateway.protocol.structured import Shape

GRAMMAR_SECONDS = 1.0
"""Processor time for one; large ones take some tens of milliseconds."""

MAX_KEPT = 1_024
MAX_KEPT_CHARS = 32 << 20

Kind = Literal["json_schema", "regex", "choice", "grammar", "llguidance"]


class Grammars:
    """Makes and checks grammars. Its process starts with the first one."""

    def __init__(self, seconds: float = GRAMMAR_SECONDS) -> None:
        self._seconds = seconds
        self._helper = Helper("gateway.grammar_process", {"seconds": seconds})
        self._kept: OrderedDict[bytes, dict[str, str]] = OrderedDict()  # the last used last
        self._num_kept_chars = 0
        self._lock = asyncio.Lock()

    async def constrain(self, params: GenerationParams, shape: Shape | None) -> GenerationParams:
        """`params` with the grammar of `shape`. Raises InvalidField."""
        if shape is None:
            return params
        return replace(params, grammar=await self._grammar(shape.kind, shape.source, shape.param))

    async def check(self, grammar: str, param: str) -> None:
        """That an engine can follow this grammar of llguidance, made from what `param` holds.
        Raises InvalidField."""
        await self._grammar("llguidance", grammar, param)

    async def check_schema(self, schema: Mapping[str, object], param: str, where: str) -> None:
        """The same of a JSON schema somewhere in `param`; `where` comes before what is wrong with it."""
        await self._grammar("json_schema", json.dumps(schema), param, where)

    async def _grammar(self, kind: Kind, source: str, param: str, where: str = "") -> str:
        answer = await self._answer(kind, source)
        if "refused" in answer:
            raise InvalidField(param, f"'{param}' cannot be followed: {where}{answer['refused']}")
        return answer["grammar"]

    async def _answer(self, kind: Kind, source: str) -> dict[str, str]:
        key = blake2b(f"{kind} {source}".encode(errors="surrogatepass"), digest_size=32).digest()
        if (kept := self._find(key)) is not None:
            return kept
        async with self._lock:
            if (kept := self._find(key)) is not None:  # while it waited
                return kept
            try:
                answer = await self._helper.ask({"kind": kind, "source": source})
            except HelperKilled:
                answer = {"refused": f"it takes more than {self._seconds:g} s or too much memory to compile"}
            self._keep(key, answer)
            return answer

    def _find(self, key: bytes) -> dict[str, str] | None:
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def _keep(self, key: bytes, answer: dict[str, str]) -> None:
        self._kept[key] = answer
        self._num_kept_chars += _size(answer)
        while len(self._kept) > MAX_KEPT or self._num_kept_chars > MAX_KEPT_CHARS:
            self._num_kept_chars -= _size(self._kept.popitem(last=False)[1])


def _size(answer: dict[str, str]) -> int:
    return sum(map(len, answer.values()))
