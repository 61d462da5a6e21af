"""Clients that leave: whatever they asked for stops, and the engine's memory comes back."""

from __future__ import annotations

import json
import socket
import struct

import pytest

from tests.e2e.server import MODEL, Server, events, serving, wait_until

LONG: dict[str, object] = {"max_tokens": 1900, "ignore_eos": True, "n": 4}


def aborted(server: Server) -> float:
    return server.metric("sluice:request_success_total", finished_reason="abort")


def running(server: Server) -> float:
    return server.metric("sluice:num_requests_running") + server.metric("sluice:num_requests_waiting")


def assert_all_stopped(server: Server, aborted_before: float) -> None:
    """The four sequences were aborted, not finished, and the engine holds nothing for them."""
    wait_until(lambda: aborted(server) == aborted_before + 4, "the sequences aborted", 5)
    wait_until(lambda: running(server) == 0, "the engine idle", 5)


def test_leaving_a_stream(server: Server) -> None:
    before = aborted(server)
    with server.stream(**LONG) as lines:
        stream = events(lines)
        for _ in range(4):
            next(stream)
        wait_until(lambda: running(server) == 4, "four sequences run")
    assert_all_stopped(server, before)


def test_leaving_without_a_stream(server: Server) -> None:
    """By FIN, and by RST: nobody reads any more either way."""
    for linger in (None, struct.pack("ii", 1, 0)):
        before = aborted(server)
        body = json.dumps({"model": MODEL, "prompt": "Hello", **LONG}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", server.port)) as sock:
            sock.sendall(head.encode() + body)
            wait_until(lambda: running(server) == 4, "four sequences run")
            if linger is not None:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        assert_all_stopped(server, before)


def test_those_who_stay_notice_nothing(server: Server) -> None:
    alone = server.complete(max_tokens=200, ignore_eos=True).json()["choices"]
    with server.stream(**LONG) as lines:
        next(events(lines))
        with server.stream(max_tokens=200, ignore_eos=True) as staying:
            stream = events(staying)
            text = next(stream)["choices"][0]["text"]  # type: ignore[index]
            lines.close()  # type: ignore[attr-defined]
            text += "".join(e["choices"][0]["text"] for e in stream if "choices" in e)  # type: ignore[index]
    assert text == alone[0]["text"]


def test_a_stop_string_ends_the_sequence_in_the_engine(server: Server) -> None:
    """The gateway finds the string in the text; the engine must hear of it."""
    text = server.complete(max_tokens=40, ignore_eos=True).json()["choices"][0]["text"]
    generated = server.metric("sluice:generation_tokens_total")
    response = server.complete(max_tokens=1900, ignore_eos=True, stop=[text[8:12]])
    assert response.json()["choices"][0]["finish_reason"] == "stop"
    wait_until(lambda: running(server) == 0, "the engine idle", 5)
    assert server.metric("sluice:generation_tokens_total") - generated < 400


def leave(server: Server, body: dict[str, object], num_sequences: int, linger: bytes | None) -> None:
    """Ask, wait until all of it is in the engine, and go."""
    content = json.dumps({"model": MODEL, "prompt": "Hello", "temperature": 0, **body}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as sock:
        sock.sendall(head.encode() + content)
        wait_until(lambda: running(server) == num_sequences, f"{num_sequences} sequences", 30)
        if linger is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)


@pytest.mark.parametrize("linger", [None, struct.pack("ii", 1, 0)], ids=["fin", "rst"])
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize(
    "shape",
    [{"n": 1}, {"n": 3}, {"prompt": ["Hello", "World", "There"]}, {"prompt": ["A b", "C d"], "n": 2}],
    ids=["one", "n", "prompts", "prompts-n"],
)
def test_whatever_was_asked_for_stops(
    server: Server, shape: dict[str, object], stream: bool, linger: bytes | None
) -> None:
    prompts = shape.get("prompt")
    count = int(str(shape.get("n", 1))) * (len(prompts) if isinstance(prompts, list) else 1)
    before = aborted(server)
    leave(server, {"max_tokens": 1900, "ignore_eos": True, "stream": stream, **shape}, count, linger)
    wait_until(lambda: aborted(server) == before + count, "all of them aborted", 30)
    wait_until(lambda: running(server) == 0, "the engine idle", 30)
    wait_until(lambda: server.metric("sluice:kv_cache_usage_perc") == 0, "its blocks back", 30)
    assert server.metric("sluice:kv_cache_account_faults_total") == 0


def test_leaving_the_queue() -> None:
    """Two run at a time, and a third waits for them: its client goes first, then theirs."""
    with serving("--dtype", "float32", "--max-num-seqs", "2") as server:
        alone = server.complete(max_tokens=20, ignore_eos=True).json()["choices"][0]["text"]
        with server.stream(max_tokens=1900, ignore_eos=True, n=2) as first:
            next(events(first))
            leave(server, {"max_tokens": 1900, "ignore_eos": True}, 3, None)
            wait_until(lambda: aborted(server) == 1, "the one that waited aborted", 30)
            wait_until(lambda: running(server) == 2, "the two go on", 30)
        wait_until(lambda: aborted(server) == 3, "all of them aborted", 30)
        assert server.complete(max_tokens=20, ignore_eos=True).json()["choices"][0]["text"] == alone
        wait_until(lambda: running(server) == 0, "the engine idle", 30)
