"""The bytes of a stream, against the shape that OpenAI's own server was recorded with."""

from __future__ import annotations

import json
import socket

from tests.e2e.server import MODEL, Server


def raw_post(server: Server, path: str, body: dict[str, object]) -> tuple[bytes, bytes]:
    """Head and body as they came over the wire, chunked encoding taken off."""
    payload = json.dumps({"model": MODEL, "temperature": 0, "stream": True, **body}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as sock:
        sock.sendall(f"{head}Content-Length: {len(payload)}\r\n\r\n".encode() + payload)
        data = b"".join(iter(lambda: sock.recv(65536), b""))
    head_bytes, _, rest = data.partition(b"\r\n\r\n")
    return head_bytes, unchunk(rest)


def unchunk(data: bytes) -> bytes:
    parts = []
    while data:
        size, _, data = data.partition(b"\r\n")
        length = int(size, 16)
        parts.append(data[:length])
        assert data[length : length + 2] == b"\r\n"
        data = data[length + 2 :]
    return b"".join(parts)


def parse(body: bytes) -> list[dict[str, object]]:
    """The chunks, [DONE] checked and left out."""
    assert b"\r" not in body
    *events, end = body.split(b"\n\n")
    assert end == b""
    assert events[-1] == b"data: [DONE]"
    assert all(event.startswith(b"data: {") for event in events[:-1])
    return [json.loads(event[6:]) for event in events[:-1]]


def test_chat_stream(server: Server) -> None:
    body = {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 24}
    head, data = raw_post(server, "/v1/chat/completions", {**body, "stream_options": {"include_usage": True}})
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"content-type: text/event-stream" in head.lower()
    first, *middle, last, usage = parse(data)
    assert first["choices"] == [
        {
            "index": 0,
            "delta": {"role": "assistant", "content": "", "refusal": None},
            "logprobs": None,
            "finish_reason": None,
        }
    ]
    assert middle
    for chunk in middle:
        assert chunk.keys() == first.keys()
        (choice,) = chunk["choices"]  # type: ignore[misc]
        assert list(choice["delta"]) == ["content"]
        assert choice["finish_reason"] is None
        assert chunk["usage"] is None
    (end,) = last["choices"]  # type: ignore[misc]
    assert end["delta"] == {}
    assert end["finish_reason"] in ("stop", "length")
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] <= 24  # type: ignore[index]
    assert {chunk["object"] for chunk in (first, *middle, last, usage)} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in (first, *middle, last, usage)}) == 1


def test_chat_stream_without_usage_has_none(server: Server) -> None:
    body = {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 4}
    _, data = raw_post(server, "/v1/chat/completions", body)
    assert all("usage" not in chunk for chunk in parse(data))


def test_completion_stream(server: Server) -> None:
    head, data = raw_post(
        server, "/v1/completions", {"prompt": "Sluice", "max_tokens": 6, "ignore_eos": True}
    )
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    chunks = parse(data)
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    choices = [chunk["choices"][0] for chunk in chunks]  # type: ignore[index]
    assert all(choice.keys() >= {"text", "index", "logprobs", "finish_reason"} for choice in choices)
    assert [choice["finish_reason"] for choice in choices][-1] == "length"


def test_text_that_is_cut_inside_a_character_is_never_sent(server: Server) -> None:
    """Whatever tokens come, the stream is valid UTF-8, and it adds up to the whole answer."""
    body: dict[str, object] = {"prompt": "é ü 漢字", "max_tokens": 60, "temperature": 2.0, "seed": 5}
    body |= {"ignore_eos": True, "n": 2}
    _, data = raw_post(server, "/v1/completions", body)
    texts = ["", ""]
    for chunk in parse(data):
        for choice in chunk["choices"]:  # type: ignore[attr-defined]
            texts[choice["index"]] += choice["text"]
    whole = server.complete(**body).json()
    assert texts == [choice["text"] for choice in whole["choices"]]


def test_refusals_have_openai_s_shape_and_no_stream(server: Server) -> None:
    for path, body, status in (
        ("/v1/completions", {"prompt": "x", "max_tokens": 0}, 400),
        ("/v1/completions", {"prompt": "x", "model": "other"}, 404),
        ("/v1/chat/completions", {"messages": []}, 400),
        ("/v1/nowhere", {}, 404),
    ):
        response = server.client.post(path, json={"model": MODEL, **body})
        assert response.status_code == status
        assert response.json()["error"].keys() == {"message", "type", "param", "code"}
