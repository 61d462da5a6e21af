"""What is written about requests, and what is not: keys, prompts, queries; no client sees the inside."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from engines.wire import RequestError
from gateway import logs
from gateway.settings import Settings
from gateway.workers.protocol import GroupState, WorkerLost, WorkerUnavailable
from tests.fakes import FakeGroup
from tests.gateway.serving import client_of, make_app, make_group

anyio = pytest.mark.anyio
KEY, PROMPT, QUERY = "canary-key-0123456789", "canaryprompt", "canaryquery"
INSIDE = "/srv/canary/model.safetensors at 0x7f00c0ffee00 of 10.1.2.3:29500"
SETTINGS = Settings(api_keys=(KEY,), access_log=True, max_body_bytes=4_000)


@contextmanager
def written(formatter: logging.Formatter, level: int = logging.INFO) -> Iterator[io.StringIO]:
    """Everything that is logged, as it would be written."""
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    handler.setFormatter(formatter)
    handler.addFilter(lambda record: not record.name.startswith("httpx"))  # the client's
    root = logging.getLogger()
    before = root.level
    root.addHandler(handler)
    root.setLevel(level)
    try:
        yield text
    finally:
        root.removeHandler(handler)
        root.setLevel(before)


async def ask(model_dir: Path, group: FakeGroup, **fields: Any) -> tuple[httpx.Response, str]:
    """The answer to a request full of canaries, and the metrics after it."""
    body = {"model": "demo", "messages": [{"role": "user", "content": PROMPT}]} | fields
    async with client_of(make_app(model_dir, group, settings=SETTINGS)) as client:
        headers = {"authorization": f"Bearer {KEY}", "x-request-id": "the-request"}
        url = f"/v1/chat/completions?x={QUERY}"
        response = await client.post(url, json=body, headers=headers)
        metrics = await client.get("/metrics", headers=headers)
        return response, metrics.text


FAILURES: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    # what the group does, what is asked for, status
    "fine": ({}, {}, 200),
    "unknown field": ({}, {"what": PROMPT}, 400),
    "bad value": ({}, {"temperature": PROMPT}, 400),
    "bad role": ({}, {"messages": [{"role": PROMPT, "content": PROMPT}]}, 400),
    "no such model": ({}, {"model": PROMPT}, 404),
    "template refuses": (
        {},
        {"messages": [{"role": "user", "content": PROMPT}, {"role": "system", "content": PROMPT}]},
        400,
    ),
    "too long": ({}, {"max_tokens": 5_000}, 400),
    "too large": ({}, {"user": PROMPT * 1_000}, 413),
    "refused": ({"fails_after": 0, "fails_with": RequestError("invalid_request", "no")}, {}, 400),
    "failed": ({"fails_after": 0, "fails_with": RequestError("internal", INSIDE)}, {}, 500),
    "lost": ({"fails_after": 0, "fails_with": WorkerLost(INSIDE)}, {}, 503),
    "timed out": ({"fails_after": 0, "fails_with": TimeoutError(INSIDE)}, {}, 504),
    "down": ({"state": GroupState.RESTARTING, "failure": INSIDE}, {}, 503),
    "failed for good": ({"state": GroupState.FAILED, "failure": INSIDE}, {}, 503),
    "unexpected": ({"fails_after": 0, "fails_with": RuntimeError(f"{INSIDE} {PROMPT}")}, {}, 500),
    "unexpected key": ({"fails_after": 0, "fails_with": KeyError(PROMPT)}, {}, 500),
}


@anyio
@pytest.mark.parametrize("formatter", [logs.JsonFormatter(), logs.TextFormatter()], ids=["json", "text"])
@pytest.mark.parametrize("name", FAILURES)
async def test_no_failure_tells_what_it_should_not(
    model_dir: Path, name: str, formatter: logging.Formatter
) -> None:
    does, asks, status = FAILURES[name]
    if isinstance(does.get("fails_with"), WorkerLost):
        does = does | {"fails_with": WorkerLost(INSIDE)}
    group = make_group(model_dir, **does)
    with written(formatter) as text:
        response, metrics = await ask(model_dir, group, **asks)
    log = text.getvalue()
    assert response.status_code == status, response.text
    for canary in (KEY, PROMPT, QUERY):
        assert canary not in log
        assert canary not in metrics
    assert KEY not in response.text
    for canary in ("canary/", "safetensors", "0x7f", "10.1.2.3", "Traceback"):
        assert canary not in response.text
        assert canary not in metrics
    assert "the-request" in log  # so the log does tell of it
    assert log.count("/v1/chat/completions") >= 1


@anyio
async def test_an_unexpected_failure_is_found_in_the_log(model_dir: Path) -> None:
    """Where it happened, not what it said; at debug level also what it said."""
    group = make_group(model_dir, fails_after=0, fails_with=RuntimeError(INSIDE))
    for level, is_said in ((logging.INFO, False), (logging.DEBUG, True)):
        with written(logs.JsonFormatter(), level) as text:
            await ask(model_dir, group)
        line = next(
            record for record in map(json.loads, text.getvalue().splitlines()) if "exception" in record
        )
        assert (line["level"], line["request_id"]) == ("error", "the-request")
        assert "fakes.py" in line["exception"]
        assert "RuntimeError" in line["exception"]
        assert (INSIDE in line["exception"]) == is_said


@anyio
@pytest.mark.parametrize("stream", [True, False])
async def test_a_request_is_a_line_of_the_access_log(model_dir: Path, stream: bool) -> None:
    with written(logs.JsonFormatter()) as text:
        await ask(model_dir, make_group(model_dir), stream=stream)
    lines = [json.loads(line) for line in text.getvalue().splitlines()]
    first, _ = [line for line in lines if line["logger"] == "gateway.access"]
    assert first.pop("time").endswith("+00:00")
    assert first.pop("ms") >= 0
    assert first.pop("key").startswith("key-")
    assert first == {
        "level": "info",
        "logger": "gateway.access",
        "message": "request",
        "request_id": "the-request",
        "method": "POST",
        "path": "/v1/chat/completions",
        "status": 200,
    }


@anyio
async def test_the_access_log_is_off_unless_asked_for(model_dir: Path) -> None:
    async with client_of(make_app(model_dir, make_group(model_dir))) as client:
        with written(logs.JsonFormatter()) as text:
            await client.get("/livez")
    assert "/livez" not in text.getvalue()


@anyio
async def test_metric_labels_stay_few_whatever_is_asked(model_dir: Path) -> None:
    async with client_of(make_app(model_dir, make_group(model_dir))) as client:

        async def num_series() -> int:
            return len((await client.get("/metrics")).text.splitlines())

        await client.post("/v1/completions", json={"model": "x", "prompt": "x"})
        await client.get("/nope")
        before = await num_series()
        for number in range(200):
            await client.post("/v1/completions", json={"model": f"m{number}", "prompt": "x"})
            await client.get(f"/nope/{number}", headers={"x-request-id": f"id-{number}"})
        assert await num_series() == before


@pytest.mark.parametrize("formatter", [logs.JsonFormatter(), logs.TextFormatter()], ids=["json", "text"])
def test_a_message_cannot_begin_a_line_of_its_own(formatter: logging.Formatter) -> None:
    hostile = "a\r\n2026-01-01 INFO forged\x1b[31m\x00\u2028\x85\udc80"
    with written(formatter) as text:
        logging.getLogger("gateway.test").warning("found %s", hostile)
    (line,) = text.getvalue().splitlines()
    assert line.isprintable()
    assert "forged" in line
    if isinstance(formatter, logs.JsonFormatter):
        assert json.loads(line)["message"].startswith("found a\r\n2026")


def test_the_path_in_the_access_log_is_bounded_and_plain() -> None:
    with written(logs.JsonFormatter()) as text:
        logs.log_access("G" * 1_000, b"/\xff\n" + b"x" * 10_000, 200, 0.1, None)
    line = json.loads(text.getvalue())
    assert line["path"].startswith("/\\xff\n")
    assert len(text.getvalue()) < 500
    assert line["key"] == "-"


def test_outside_of_requests_an_exception_says_what_it_is() -> None:
    with written(logs.TextFormatter()) as text:
        try:
            raise ValueError("why") from OSError("because")
        except ValueError:
            logging.getLogger("gateway.test").exception("stopped")
    assert "ValueError: why" in text.getvalue()
    assert "OSError: because" in text.getvalue()


def test_worker_unavailable_says_nothing_of_the_inside() -> None:
    from gateway.errors import to_api_error

    assert INSIDE not in to_api_error(WorkerUnavailable(INSIDE)).body.decode()
