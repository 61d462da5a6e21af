"""Random JSON schemas, at any temperature: what is complete is of its schema, as `jsonschema` says.

    python -m tests.soak.schemas --trials 1000

Schemas go the gateway's way (gateway/grammar_process.py), answers come from the real scheduler, runner and
native engine in this process, over random weights, in batches of different schemas. `format` is not checked:
JSON Schema makes it a remark.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from tokenizers import Tokenizer

from engines.runtime.grammar import Grammars
from engines.wire import Generate, SamplingParams
from gateway.grammar_process import Refused, make
from tests.engines.harness import Ended
from tests.engines.runtime.in_process import EOS, InProcess, load
from tests.models import MHA, make_llama, write_byte_tokenizer
from tests.soak import _figures

BATCH = 16
MAX_TOKENS = 600
TEMPERATURES = (0.0, 0.3, 0.7, 1.0, 1.5, 2.0)
SHAPE = replace(MHA, vocab=301)
PATTERNS = ("^[a-z]{2,5}$", "[0-9]+-[0-9]+$", "^(yes|no|maybe)$", "^A.{0,3}Z$", "^\\w{1,4}$", "é{1,3}")
FORMATS = ("date", "time", "date-time", "uuid", "ipv4", "email", "hostname", "duration", "ipv6", "uri")

Schema = dict[str, Any]


class Draw:
    """Random schemas, from one seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def root(self) -> Schema:
        schema = self._random.choice((self._object, self._object, self._object, self._any))(3)
        if self._random.random() < 0.3:
            schema = self._with_definitions(schema)
        return schema

    def _with_definitions(self, schema: Schema) -> Schema:
        tail = {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}
        node = {"type": "object", "properties": {"v": self._leaf(0), "next": tail}, "required": ["v"]}
        references = {"n": {"$ref": "#/$defs/node"}, "l": {"$ref": "#/$defs/leaf"}}
        return {
            "type": "object",
            "$defs": {"leaf": self._leaf(0), "node": node | {"additionalProperties": False}},
            "properties": {"a": schema, **references},
            "required": self._some(["a", "n", "l"]),
        }

    def _any(self, depth: int) -> Schema:
        inner = [self._array, self._object, self._union, self._tuple, self._all]
        is_leaf = depth == 0 or self._random.random() < 0.4
        return self._leaf(0) if is_leaf else self._random.choice(inner)(depth - 1)

    def _leaf(self, depth: int) -> Schema:
        return self._random.choice((self._string, self._integer, self._number, self._constant))()

    def _string(self) -> Schema:
        low, draw = self._random.randint(0, 4), self._random
        length = {"minLength": low, "maxLength": low + draw.randint(0, 12)}
        kinds: tuple[Schema, ...] = (
            length,
            length,
            {"maxLength": 9},
            {"pattern": draw.choice(PATTERNS)},
            {"format": draw.choice(FORMATS)},
            {},
        )
        return {"type": "string", **draw.choice(kinds)}

    def _integer(self) -> Schema:
        low, draw = self._random.randint(-300, 300), self._random
        extra: Schema = draw.choice(
            (
                {},
                {"minimum": low},
                {"maximum": low},
                {"minimum": low, "maximum": low + draw.randint(0, 900)},
                {"exclusiveMinimum": low, "exclusiveMaximum": low + draw.randint(2, 50)},
                {"multipleOf": draw.randint(1, 12), "minimum": 0, "maximum": 1000},
            )
        )
        return {"type": "integer", **extra}

    def _number(self) -> Schema:
        low, draw = self._random.uniform(-100, 100), self._random
        between = {"minimum": round(low, 2), "maximum": round(low + draw.uniform(0.5, 90), 2)}
        return {"type": "number", **draw.choice(({}, between, {"multipleOf": 0.25}))}

    def _constant(self) -> Schema:
        values = [None, True, 17, -2.5, "x", 'quote " and \\ \n', "é€😀", [], [1, "a"], {}, {"k": [None]}]
        draw = self._random
        return draw.choice(
            (
                {"type": "boolean"},
                {"type": "null"},
                {"const": draw.choice(values)},
                {"enum": draw.sample(values, draw.randint(1, 6))},
                {"type": ["string", "null"], "maxLength": 5},
                {"type": ["integer", "boolean"]},
            )
        )

    def _array(self, depth: int) -> Schema:
        low = self._random.randint(0, 2)
        return {
            "type": "array",
            "items": self._any(depth),
            "minItems": low,
            "maxItems": low + self._random.randint(0, 3),
        }

    def _tuple(self, depth: int) -> Schema:
        items = [self._any(depth) for _ in range(self._random.randint(1, 3))]
        rest = self._random.choice((False, self._leaf(0)))
        return {"type": "array", "prefixItems": items, "items": rest, "minItems": len(items), "maxItems": 4}

    def _union(self, depth: int) -> Schema:
        if self._random.random() < 0.3:
            return {"oneOf": [{"type": "string", "maxLength": 4}, {"type": "null"}, self._object(depth)]}
        return {"anyOf": [self._any(depth) for _ in range(self._random.randint(1, 3))]}

    def _all(self, depth: int) -> Schema:
        first, second = self._object(depth), self._object(depth)
        first.pop("additionalProperties", None)
        second.pop("additionalProperties", None)
        return {"allOf": [first, second]}

    def _object(self, depth: int) -> Schema:
        names = self._some(["a", "name", "x y", 'q"', "é", "n/a", "$id2"])
        schema: Schema = {
            "type": "object",
            "properties": {name: self._any(depth) for name in names},
            "required": self._some(names),
        }
        draw = self._random.random()
        if draw < 0.6:
            schema["additionalProperties"] = False
        elif draw < 0.8:
            schema["additionalProperties"] = self._leaf(0)
            schema["maxProperties"] = len(names) + 2
            schema["required"] = names
        elif draw < 0.9:
            schema |= {"patternProperties": {"^p_[a-z]{1,3}$": self._leaf(0)}, "additionalProperties": False}
        return schema

    def _some(self, names: list[str]) -> list[str]:
        return self._random.sample(names, self._random.randint(0, len(names)))


def run(trials: int) -> dict[str, object]:
    """`complete` answers ended by themselves, `cut` ones at their length: those need only be begun well."""
    draw, seen = Draw(seed=7), Counter[str]()
    with tempfile.TemporaryDirectory() as scratch:
        directory = make_llama(Path(scratch) / "model", SHAPE, seed=3)
        write_byte_tokenizer(directory)
        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        grammars = Grammars(directory / "tokenizer.json", SHAPE.vocab, [EOS])
        engine = load(directory)
        wrong: list[dict[str, object]] = []
        for start in range(0, trials, BATCH):
            schemas = [draw.root() for _ in range(min(BATCH, trials - start))]
            requests = {f"{start + i}": _request(start + i, each, seen) for i, each in enumerate(schemas)}
            sent = [request for request in requests.values() if request is not None]
            answers = InProcess(engine, grammars=grammars).run(sent)
            ended = dict(zip((each.id for each in sent), answers, strict=True))
            for i, schema in enumerate(schemas):
                if (one := ended.get(f"{start + i}")) is not None:
                    problem = _judge(one, schema, tokenizer.decode, seen)
                    wrong += [problem] if problem is not None else []
    counts = {key: seen[key] for key in ("complete", "cut", "refused")}
    return {"schemas": trials, **counts, "failed": len(wrong), "wrong": wrong[:10]}


def _request(number: int, schema: Schema, seen: Counter[str]) -> Generate | None:
    try:
        grammar = make("json_schema", json.dumps(schema))
    except Refused:
        seen["refused"] += 1
        return None
    temperature = TEMPERATURES[number % len(TEMPERATURES)]
    return Generate(
        id=str(number),
        prompt_ids=[2 + number % 250, 3],
        max_tokens=MAX_TOKENS,
        sampling=SamplingParams(temperature=temperature, seed=number),
        grammar=grammar,
    )


def _judge(
    ended: Ended, schema: Schema, decode: Callable[[list[int]], str], seen: Counter[str]
) -> dict[str, object] | None:
    text = decode(ended.token_ids)
    if ended.finish_reason == "length":
        seen["cut"] += 1
        return None
    try:
        assert ended.finish_reason == "stop", ended.error
        Draft202012Validator(schema).validate(json.loads(text))
    except Exception as error:  # whatever it is, it is a finding
        return {"schema": schema, "text": text, "why": f"{type(error).__name__}: {str(error)[:300]}"}
    seen["complete"] += 1
    return None


if __name__ == "__main__":
    _figures.main("schemas", __doc__, 1_000, run)
