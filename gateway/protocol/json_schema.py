"""Requests and responses as JSON Schema, for the OpenAPI document: read from the types themselves."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Literal

import msgspec
from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, models_json_schema
from pydantic_core import core_schema

from gateway.protocol.common import RequestPart

JsonSchema = dict[str, Any]
COMPONENTS = "#/components/schemas/"


def schemas_of(
    requests: Collection[type[RequestPart]], responses: Collection[type[msgspec.Struct]]
) -> tuple[dict[type, JsonSchema], dict[str, JsonSchema]]:
    """A reference to each type, and the components that they and what is in them are.

    A request and a response of one name are told apart as FastAPI does it: Name-Input and Name-Output.
    """
    inputs, input_parts = _of_requests(requests)
    outputs, output_parts = _of_responses(responses)
    twice = input_parts.keys() & output_parts.keys()
    inputs, input_parts = _renamed(inputs, input_parts, {name: f"{name}-Input" for name in twice})
    outputs, output_parts = _renamed(outputs, output_parts, {name: f"{name}-Output" for name in twice})
    return inputs | outputs, dict(sorted((input_parts | output_parts).items()))


def reference(name: str) -> JsonSchema:
    return {"$ref": COMPONENTS + name}


class _Generator(GenerateJsonSchema):
    """Without titles that repeat the field, and without defaults: null is the one that they would show."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchema:
        return self.generate_inner(schema["schema"])


def _of_requests(
    models: Collection[type[RequestPart]],
) -> tuple[dict[type, JsonSchema], dict[str, JsonSchema]]:
    asked: list[tuple[type[BaseModel], Literal["validation"]]] = [(model, "validation") for model in models]
    found, document = models_json_schema(
        asked,
        ref_template=f"{COMPONENTS}{{model}}",
        schema_generator=_Generator,
    )
    references: dict[type, JsonSchema] = {model: schema for (model, _), schema in found.items()}
    parts = document.get("$defs", {})
    return _renamed(references, parts, {name: name.lstrip("_") for name in parts})


def _of_responses(
    structs: Collection[type[msgspec.Struct]],
) -> tuple[dict[type, JsonSchema], dict[str, JsonSchema]]:
    schemas, parts = msgspec.json.schema_components(structs, ref_template=f"{COMPONENTS}{{name}}")
    for struct in _within(structs):
        _say_what_is_written(parts[struct.__name__], struct)
    return dict(zip(structs, schemas, strict=True)), parts


def _within(structs: Collection[type[msgspec.Struct]]) -> Iterator[type[msgspec.Struct]]:
    """Every struct in these, and these."""
    seen: set[type] = set()
    pending: list[msgspec.inspect.Type] = list(msgspec.inspect.multi_type_info(structs))
    while pending:
        found = pending.pop()
        if isinstance(found, msgspec.inspect.StructType):
            if found.cls in seen:
                continue
            seen.add(found.cls)
            yield found.cls
            pending += [field.type for field in found.fields]
        else:
            for name in ("types", "item_types"):
                pending += getattr(found, name, ())
            for name in ("item_type", "key_type", "value_type"):
                pending += [getattr(found, name)] if hasattr(found, name) else []


def _say_what_is_written(schema: JsonSchema, struct: type[msgspec.Struct]) -> None:
    """msgspec's schemas are those of what it reads, where a field with a default may be absent. What we
    write has each field, unless it is unset or its struct leaves out defaults."""
    for field in msgspec.structs.fields(struct):
        described = schema["properties"][field.encode_name]
        if field.encode_name == "object":
            described["const"] = field.default
        described.pop("default", None)
        is_left_out = field.default is msgspec.UNSET or struct.__struct_config__.omit_defaults
        if not field.required and not is_left_out:
            schema["required"].append(field.encode_name)


def _renamed(
    references: Mapping[type, JsonSchema], parts: Mapping[str, JsonSchema], names: Mapping[str, str]
) -> tuple[dict[type, JsonSchema], dict[str, JsonSchema]]:
    """With these components called otherwise, wherever they are named."""
    new = {COMPONENTS + old: COMPONENTS + name for old, name in names.items()}

    def rename(target: str) -> str:
        return new.get(target, target)

    return (
        {kind: _with_references(schema, rename) for kind, schema in references.items()},
        {names.get(name, name): _with_references(schema, rename) for name, schema in parts.items()},
    )


def _with_references(schema: Any, rename: Callable[[str], str]) -> Any:
    if isinstance(schema, list):
        return [_with_references(inner, rename) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: rename(inner) if key == "$ref" and isinstance(inner, str) else _with_references(inner, rename)
        for key, inner in schema.items()
    }
