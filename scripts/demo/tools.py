"""Functions that a conversation lists, questions that one of them answers, and answers in JSON.

The model does not learn functions by heart: their names, their parameters and the values in the questions are
drawn anew, so it learns to copy them from where they stand.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from scripts.demo import words

Value = str | int
Draw = Callable[[random.Random], Value]


@dataclass(frozen=True)
class Parameter:
    """One of the `names` that it may have, and the values it takes."""

    names: tuple[str, ...]
    draw: Draw

    def type_of(self, value: Value) -> str:
        return "integer" if isinstance(value, int) else "string"


@dataclass(frozen=True)
class Function:
    """What a user may list. `frames` ask for it, with the parameters' values in their order."""

    names: tuple[str, ...]
    descriptions: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    frames: tuple[str, ...]
    results: tuple[str, ...]


@dataclass(frozen=True)
class Listed:
    """A function as one conversation lists it."""

    function: Function
    name: str
    description: str
    parameters: tuple[str, ...]  # their names
    types: tuple[str, ...]

    @property
    def line(self) -> str:
        """As the chat template shows it: a call with types in the place of values, and what it is for."""
        pairs = zip(self.parameters, self.types, strict=True)
        inner = ", ".join(f'"{name}": {type_}' for name, type_ in pairs)
        return f'{{"name": "{self.name}", "arguments": {{{inner}}}}} {self.description}'

    @property
    def definition(self) -> dict[str, object]:
        """As a request has it."""
        types = zip(self.parameters, self.types, strict=True)
        properties = {name: {"type": type_} for name, type_ in types}
        parameters = {"type": "object", "properties": properties}
        function = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": function}

    def call(self, values: tuple[Value, ...]) -> str:
        arguments = json.dumps(dict(zip(self.parameters, values, strict=True)), ensure_ascii=False)
        return f'<tool_call>\n{{"name": "{self.name}", "arguments": {arguments}}}\n</tool_call>'


def syllables(rng: random.Random, at_least: int = 2, at_most: int = 3) -> str:
    return "".join(
        rng.choice("bcdfghjklmnprstvwz") + rng.choice("aeiou") for _ in range(rng.randint(at_least, at_most))
    )


def city(rng: random.Random) -> str:
    return rng.choice(words.CITIES) if rng.random() < 0.75 else syllables(rng).capitalize()


def person(rng: random.Random) -> str:
    return rng.choice(words.NAMES) if rng.random() < 0.75 else syllables(rng).capitalize()


def thing(rng: random.Random) -> str:
    return rng.choice(words.WARES) if rng.random() < 0.75 else syllables(rng)


def number(rng: random.Random) -> int:
    return rng.randint(0, rng.choice((9, 20, 99, 999, 9999)))


def small(rng: random.Random) -> int:
    return rng.randint(1, 20)


def one_of(values: str) -> Draw:
    return lambda rng: rng.choice(values.split())


DRAWS: dict[str, Draw] = {
    "city": city,
    "person": person,
    "thing": thing,
    "number": number,
    "small": small,
    "room": one_of("kitchen bedroom office bathroom hall garage cellar garden"),
    "colour": one_of("red blue green white yellow black orange purple"),
    "day": one_of("Monday Tuesday Wednesday Thursday Friday Saturday Sunday today tomorrow"),
    "money": one_of("euros dollars pounds yen francs crowns"),
    "language": one_of("French German Spanish Italian Japanese Latin Dutch Polish"),
}
"""The kinds of values, by the names that functions.yaml has for them."""


def _read(entry: dict[str, Any]) -> Function:
    """One entry of functions.yaml."""
    parameters = [
        Parameter(tuple(names), DRAWS[kind])
        for each in entry.pop("parameters")
        for kind, names in each.items()
    ]
    return Function(parameters=tuple(parameters), **{name: tuple(texts) for name, texts in entry.items()})


FUNCTIONS = tuple(map(_read, yaml.safe_load(Path(__file__).with_name("functions.yaml").read_text("utf-8"))))

NOUNS = ("tool", "service", "helper", "api", "task", "data", "info", "entry", "job", "value")
VERBS = ("run", "do", "ask", "use", "fetch", "read", "query", "invoke", "make", "start")


def listed(function: Function, rng: random.Random) -> Listed:
    name = rng.choice(function.names)
    if (draw := rng.random()) < 0.15:
        name = f"{rng.choice(VERBS)}_{rng.choice(NOUNS)}"
    elif draw < 0.25:
        name = f"{rng.choice(VERBS)}_{syllables(rng)}"
    names: list[str] = []
    for parameter in function.parameters:
        left = [each for each in parameter.names if each not in names]
        names.append(rng.choice(left) if rng.random() < 0.9 else syllables(rng))
    types = tuple(each.type_of(each.draw(rng)) for each in function.parameters)
    if rng.random() < 0.3:
        types = tuple("number" if each == "integer" else each for each in types)
    return Listed(function, name, rng.choice(function.descriptions), tuple(names), types)


def some_listed(rng: random.Random) -> list[Listed]:
    """One to four functions with different names."""
    found: dict[str, Listed] = {}
    for function in rng.sample(FUNCTIONS, rng.choice((1, 1, 2, 2, 3, 4))):
        each = listed(function, rng)
        found.setdefault(each.name, each)
    return list(found.values())


@dataclass(frozen=True)
class Step:
    """A call of the model's and what came of it."""

    call: str
    result: str


def ask(each: Listed, rng: random.Random) -> tuple[str, Step, str]:
    """A question, the call for it with a result, and the answer that tells it."""
    values = tuple(parameter.draw(rng) for parameter in each.function.parameters)
    question = rng.choice(each.function.frames).format(*values)
    result = rng.choice(each.function.results).format(n=number(rng), w=syllables(rng))
    return question, Step(each.call(values), result), told(each.name, result)


def told(name: str, result: str) -> str:
    """What the model says when a function has answered."""
    if result.startswith("{"):
        result = ", ".join(f"{key}: {value}" for key, value in json.loads(result).items())
    return f"{name} says: {result}."


# -- answers in JSON -------------------------------------------------------------------------------

JSON_CLOSERS = (
    " Answer in JSON.",
    " Reply in JSON.",
    " As JSON, please.",
    " Give me JSON.",
    " In JSON.",
    " Answer with JSON.",
    " Return JSON.",
)
RECORDS: tuple[tuple[str, dict[str, str]], ...] = (
    (
        "{name} is {age} years old and lives in {city}.",
        {"name": "person", "age": "number", "city": "city"},
    ),
    ("{name} is {age}.", {"name": "person", "age": "number"}),
    ("My name is {name} and I live in {city}.", {"name": "person", "city": "city"}),
    ("{count} {item} cost {price} euros.", {"item": "thing", "count": "small", "price": "number"}),
    ("The {item} cost {price}.", {"item": "thing", "price": "number"}),
    ("{name} meets us in {city} on {day}.", {"name": "person", "city": "city", "day": "day"}),
    ("{name} bought {count} {item}.", {"name": "person", "item": "thing", "count": "small"}),
    ("The {room} is {colour}.", {"room": "room", "colour": "colour"}),
    ("{name} speaks {language}.", {"name": "person", "language": "language"}),
    ("It is {temperature} degrees in {city}.", {"city": "city", "temperature": "small"}),
    ("{name} flies from {from} to {to}.", {"name": "person", "from": "city", "to": "city"}),
)
"""Sentences, and what kind of value each of their keys has."""


def record(rng: random.Random) -> tuple[str, str]:
    """A sentence to be put into JSON, mostly with the keys to use, and that JSON."""
    sentence, fields = rng.choice(RECORDS)
    values: dict[str, Value] = {name: DRAWS[kind](rng) for name, kind in fields.items()}
    question = sentence.format(**values)
    keys = list(values)
    if rng.random() < 0.7:
        rng.shuffle(keys)
        keys = keys[: rng.randint(1, len(keys))] if rng.random() < 0.4 else keys
        named = keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])} and {keys[-1]}"
        noun = "key" if len(keys) == 1 else "keys"
        closer = rng.choice(
            (" Answer in JSON with the {} {}.", " As JSON with the {} {}.", " Return JSON with the {} {}.")
        )
        question += closer.format(noun, named)
    else:
        question += rng.choice((*JSON_CLOSERS, " Put that into JSON.", " Make that JSON."))
    return question, json.dumps({key: values[key] for key in keys}, ensure_ascii=False)


def in_json(answer: str, rng: random.Random) -> tuple[str, str]:
    """What to add to a question, and its answer in JSON."""
    return rng.choice(JSON_CLOSERS), json.dumps({"answer": answer}, ensure_ascii=False)
