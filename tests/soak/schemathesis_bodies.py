"""schemathesis over our OpenAPI document against a real `sluice serve`, over groups without torch.

A third of the bodies are as the document allows, a third of those with few optional fields, so that more of
them are answered, and a third break it. No answer may be a 5xx; each must be one that the document names, by
its status, its type, its headers, its body or events; what breaks the document must be refused, and all that
needs a key must be refused without one.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis
import requests
import schemathesis
from hypothesis import Phase
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks
from schemathesis.core.failures import Failure, FailureGroup

from tests.e2e.server import FAKE_SERVE, Server, serving
from tests.soak import _figures

KEY = "a-key-for-tests"
HEADERS = {"Authorization": f"Bearer {KEY}", "x-api-key": KEY}
MOST = 2_000
"""Bounds above it are not generated at: bodies there are hundreds of MB, and tests of their own try them."""
SECONDS = 120
FEW = 3
"""Optional fields of a body, of those that are to be answered."""
NOT_CHECKED = {
    "positive_data_acceptance": "which fields go together, JSON Schema does not tell",
    "use_after_free": "nothing is made or deleted",
    "ensure_resource_availability": "nothing is made or deleted",
    "object_level_authorization": "nothing belongs to anybody",
}


@dataclass
class Seen:
    """What came of the requests."""

    statuses: Counter[int] = field(default_factory=Counter)
    by_operation: dict[str, Counter[int]] = field(default_factory=dict)
    num_streams: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def num_bodies(self) -> int:
        return sum(sum(counter.values()) for name, counter in self.by_operation.items() if "POST" in name)

    def add(self, name: str, response: Any) -> None:
        self.statuses[response.status_code] += 1
        self.by_operation.setdefault(name, Counter())[response.status_code] += 1
        self.num_streams += "event-stream" in str(response.headers.get("content-type"))


def checks() -> list[Callable[..., bool | None]]:
    """All but those above."""
    load_all_checks()
    names = CHECKS.get_all_names()
    assert set(NOT_CHECKED) <= set(names)
    return CHECKS.get_by_names([name for name in names if name not in NOT_CHECKED])


def without_large_bounds(content: Any) -> Any:
    """The document, but for bounds that only a huge body would come near."""
    if isinstance(content, list):
        return [without_large_bounds(inner) for inner in content]
    if not isinstance(content, dict):
        return content
    return {
        name: without_large_bounds(inner)
        for name, inner in content.items()
        if not (name in ("maxLength", "maxItems") and isinstance(inner, int) and inner > MOST)
    }


def closed(document: dict[str, Any]) -> dict[str, Any]:
    """The document, in which responses have the fields that are named and no others."""
    for component in document["components"]["schemas"].values():
        if component.get("type") == "object" and "properties" in component:
            component.setdefault("additionalProperties", False)
    return document


def with_whole_numbers(content: Any) -> Any:
    """Whole numbers written as such: 3.0 is an integer to JSON Schema, and none to us."""
    if isinstance(content, list):
        return [with_whole_numbers(inner) for inner in content]
    if isinstance(content, dict):
        return {name: with_whole_numbers(inner) for name, inner in content.items()}
    return int(content) if isinstance(content, float) and content.is_integer() else content


@st.composite
def with_few_fields(draw: st.DrawFn, cases: st.SearchStrategy[Any], required: frozenset[str]) -> Any:
    case = draw(cases)
    if isinstance(case.body, dict):
        case.body = with_whole_numbers(case.body)
        optional = sorted(case.body.keys() - required)
        kept = draw(st.lists(st.sampled_from(optional), max_size=FEW)) if optional else []
        case.body = {name: value for name, value in case.body.items() if name in required or name in kept}
    return case


class Run:
    """Cases of one document against one server."""

    def __init__(self, url: str, document: dict[str, Any]) -> None:
        self.seen = Seen()
        self._url = url
        self._document = document
        self._schema = schemathesis.openapi.from_dict(without_large_bounds(closed(document)))
        self._schema.config.update(base_url=url)
        self._checks = checks()
        self._session = requests.Session()

    def all(self, num_bodies: int, num_others: int) -> Seen:
        """About `num_bodies` requests with a body, divided evenly; `num_others` of each operation without."""
        operations = [result.ok() for result in self._schema.get_all_operations()]
        num_with_body = sum(operation.method == "post" for operation in operations)
        for operation in operations:
            fine = operation.as_strategy(GenerationMode.POSITIVE, headers=HEADERS)
            if operation.method != "post":
                self._send(fine, operation.label, num_others)
                continue
            share = -(-num_bodies // (3 * num_with_body))
            self._send(fine, operation.label, share)
            self._send(with_few_fields(fine, self._required(operation.path)), operation.label, share)
            wrong = operation.as_strategy(GenerationMode.NEGATIVE, headers=HEADERS)
            self._send(wrong, operation.label, share)
            found = (
                f"{in_order(self.seen.by_operation[operation.label])}, problems: {len(self.seen.problems)}"
            )
            print(operation.label, found, file=sys.stderr, flush=True)
        return self.seen

    def _required(self, path: str) -> frozenset[str]:
        body = self._document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        name = body["schema"]["$ref"].rsplit("/", 1)[1]
        return frozenset(self._document["components"]["schemas"][name].get("required", ()))

    def _send(self, cases: st.SearchStrategy[Any], name: str, num: int) -> None:
        @hypothesis.seed(1)
        @hypothesis.settings(
            max_examples=num,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(cases)
        def send(case: Any) -> None:
            self._try(case, name)

        send()

    def _try(self, case: Any, name: str) -> None:
        """A failure is noted, not raised: hypothesis would look for a smaller one, which costs time."""
        sent = {"headers": HEADERS, "session": self._session, "timeout": SECONDS}
        response = case.call(self._url, **sent)
        self.seen.add(name, response)
        try:
            case.validate_response(response, checks=self._checks, transport_kwargs=sent)
        except FailureGroup as group:
            self.seen.problems += [_problem(name, case, response, failure) for failure in group.exceptions]
        except Failure as failure:
            self.seen.problems.append(_problem(name, case, response, failure))


def _problem(name: str, case: Any, response: Any, failure: BaseException) -> str:
    what = " ".join(str(failure).split())[:300]
    body = json.dumps(case.body, default=repr)[:300]
    return f"{name}: {type(failure).__name__}: {what}: {body} -> {response.status_code} {response.text[:300]}"


@contextmanager
def documented() -> Iterator[tuple[Server, dict[str, Any]]]:
    """A server over fake groups that asks for `KEY`, and its document."""
    with tempfile.TemporaryDirectory() as directory:
        spec = Path(directory) / "spec.json"
        spec.write_text(json.dumps({"step_seconds": 0.0, "max_model_len": 128}))  # n=128 is soon answered
        arguments = ("--spec", str(spec), "--api-key", KEY, "--pooling", "mean")
        with serving(*arguments, program=FAKE_SERVE) as server:
            server.client.headers["authorization"] = f"Bearer {KEY}"
            yield server, server.client.get("/openapi.json").json()


def run(trials: int) -> dict[str, object]:
    with documented() as (server, document):
        workers = {process.pid for process in server.workers().values()}
        seen = Run(server.url, document).all(trials, 100)
        num_dead = len(workers - {process.pid for process in server.workers().values()})
        assert server.complete().status_code == 200
    return {
        "schemathesis": schemathesis.__version__,
        "bodies": seen.num_bodies,
        "requests without a body": sum(seen.statuses.values()) - seen.num_bodies,
        "statuses": in_order(seen.statuses),
        "by operation": {name: in_order(seen.by_operation[name]) for name in sorted(seen.by_operation)},
        "streams among the answers": seen.num_streams,
        "5xx": sum(num for status, num in seen.statuses.items() if status >= 500),
        "workers that died": num_dead,
        "answers that the document does not name": len(seen.problems),
        "problems": seen.problems[:20],
        "failed": len(seen.problems) + num_dead,
    }


def in_order(counts: Counter[int]) -> dict[str, int]:
    return {str(status): num for status, num in sorted(counts.items())}


if __name__ == "__main__":
    _figures.main("schemathesis_bodies", __doc__, 20_000, run)
