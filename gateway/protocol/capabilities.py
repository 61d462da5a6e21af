"""What becomes of every field of every endpoint, as data: read from the request models and their rules.

`GET /v1/capabilities` answers with it. `python -m gateway.protocol.capabilities` writes docs/compatibility.md
and the table in README.md.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import msgspec

from gateway.protocol.anthropic import CountTokensRequest, MessagesRequest
from gateway.protocol.chat import ChatCompletionRequest
from gateway.protocol.common import RequestPart
from gateway.protocol.completions import CompletionRequest
from gateway.protocol.embeddings import EmbeddingsRequest
from gateway.protocol.responses import ResponseRequest
from gateway.protocol.tokenize import DetokenizeRequest, TokenizeRequest
from gateway.protocol.unserved import UNSERVED

ENDPOINTS: dict[str, type[RequestPart]] = {
    "/v1/chat/completions": ChatCompletionRequest,
    "/v1/completions": CompletionRequest,
    "/v1/responses": ResponseRequest,
    "/v1/messages": MessagesRequest,
    "/v1/messages/count_tokens": CountTokensRequest,
    "/v1/embeddings": EmbeddingsRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}


class Capability(msgspec.Struct, frozen=True):
    """Of one field. `why` it is ignored or refused; `allowed`: values that a refused field may have."""

    field: str  # "stop", "messages[].content[].text"
    status: Literal["supported", "ignored", "refused"]
    why: str | msgspec.UnsetType = msgspec.UNSET
    allowed: tuple[Any, ...] | msgspec.UnsetType = msgspec.UNSET


class Capabilities(msgspec.Struct, frozen=True):
    endpoints: dict[str, list[Capability]]
    unserved: dict[str, str]  # other endpoints, and why


def capabilities() -> Capabilities:
    return Capabilities({path: list(fields_of(model)) for path, model in ENDPOINTS.items()}, UNSERVED)


def fields_of(model: type[RequestPart], prefix: str = "") -> Iterator[Capability]:
    """Those of the parts within it, too, each behind the field that it is in."""
    for name, field in model.model_fields.items():
        path = prefix + (field.alias or name)
        yield Capability(path, "supported")
        for part, suffix in _parts(field.annotation):
            yield from fields_of(part, f"{path}{suffix}.")
    for name, rule in model.rules.items():
        yield Capability(prefix + name, rule.status, rule.why, rule.no_op or msgspec.UNSET)


def _parts(annotation: Any) -> Iterator[tuple[type[RequestPart], str]]:
    """The request objects in an annotation; "[]" is behind those in a list."""
    origin = get_origin(annotation)
    if isinstance(annotation, type) and issubclass(annotation, RequestPart):
        yield annotation, ""
    elif origin in (Union, types.UnionType):
        for option in get_args(annotation):
            yield from _parts(option)
    elif origin is Annotated:
        yield from _parts(get_args(annotation)[0])
    elif origin in (list, tuple):
        for part, suffix in _parts(get_args(annotation)[0]):
            yield part, f"[]{suffix}"


def markdown() -> str:
    """docs/compatibility.md: a table an endpoint."""
    lines = [
        "# Every field of every endpoint",
        "",
        "Written by `python -m gateway.protocol.capabilities`.",
        "",
    ]
    for path, found in capabilities().endpoints.items():
        lines += [f"## {path}", "", "| field | | |", "|---|---|---|"]
        lines += [f"| `{one.field}` | {one.status} | {_remark(one)} |" for one in found]
        lines.append("")
    lines += ["## Not served", "", "| endpoint | |", "|---|---|"]
    lines += [f"| `{path}` | {why} |" for path, why in UNSERVED.items()]
    return "\n".join([*lines, ""])


def summary() -> str:
    """README's table: the fields of the requests themselves."""
    lines = ["| endpoint | supported | ignored | refused |", "|---|---|---|---|"]
    for path, found in capabilities().endpoints.items():
        outer = [one for one in found if "." not in one.field]
        cells = [
            " ".join(f"`{one.field}`" for one in outer if one.status == status)
            for status in ("supported", "ignored", "refused")
        ]
        lines.append(f"| `{path}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _remark(one: Capability) -> str:
    why = "" if one.why is msgspec.UNSET else one.why
    if one.allowed is msgspec.UNSET:
        return why
    values = ", ".join(f"`{msgspec.json.encode(value).decode()}`" for value in one.allowed)
    return f"{why}; allowed: {values}"


BEGIN, END = "<!-- fields: written by python -m gateway.protocol.capabilities -->\n", "<!-- end of fields -->"


def with_summary(readme: str) -> str:
    """`readme` with its table as it should be. Raises ValueError if its marks are gone."""
    head, _, rest = readme.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not end:
        raise ValueError(f"README.md has no {BEGIN.strip()} ... {END}")
    return head + BEGIN + summary() + END + tail


def main() -> None:
    root = Path(__file__).parents[2]
    readme = root / "README.md"
    readme.write_text(with_summary(readme.read_text()))
    (root / "docs").mkdir(exist_ok=True)
    (root / "docs" / "compatibility.md").write_text(markdown())


if __name__ == "__main__":
    main()
