"""Processes killed under a running server of two ranks. One server for all: each death is recovered from."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import openai
import psutil
import pytest

from tests.e2e.server import MODEL, Server, events, serving, wait_until

RESTART_SECONDS = 60.0  # a bound: back-off, torchrun, load


@pytest.fixture(scope="module")
def pair() -> Iterator[Server]:
    with serving("--tp", "2") as server:
        yield server
        assert server.stop() == 0, server.output()
        assert server.run_dirs() == []


def leader(server: Server) -> psutil.Process:
    return server.workers()[0]


def follower(server: Server) -> psutil.Process:
    return server.workers()[1]


def launcher(server: Server) -> psutil.Process:
    return server.torchrun()


@pytest.mark.parametrize("victim", [leader, follower, launcher])
def test_open_streams_get_an_error_and_the_group_comes_back(
    pair: Server, victim: Callable[[Server], psutil.Process]
) -> None:
    pair.wait_until_ready()
    expected = pair.complete(max_tokens=16).json()["choices"]
    old = [process for process in pair.tree() if process.pid != pair.process.pid]
    with pair.stream(max_tokens=1900, ignore_eos=True) as lines:
        stream = events(lines)
        seen = [next(stream), next(stream)]
        victim(pair).kill()
        seen += stream
    *chunks, last = seen
    assert last.keys() == {"error"}  # and no [DONE] after it
    assert last["error"]["code"] == "worker_lost"  # type: ignore[index]
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks)  # type: ignore[index]

    refused = pair.complete()
    assert refused.status_code == 503
    assert int(refused.headers["retry-after"]) >= 1
    _, alive = psutil.wait_procs(old, timeout=10)
    assert alive == []  # the whole group went, not only the one that was killed

    wait_until(pair.is_ready, "serving again", RESTART_SECONDS, pair.output)
    assert pair.complete(max_tokens=16).json()["choices"] == expected
    assert len(pair.run_dirs()) == 1


def test_the_sdk_raises_when_a_rank_dies_and_waits_out_the_restart(pair: Server) -> None:
    pair.wait_until_ready()
    client = openai.OpenAI(base_url=f"{pair.url}/v1", api_key="none", max_retries=0)
    stream = client.completions.create(
        model=MODEL, prompt="Hello", max_tokens=1900, stream=True, extra_body={"ignore_eos": True}
    )
    next(stream)
    leader(pair).kill()
    with pytest.raises(openai.APIError) as error:
        list(stream)
    assert error.value.code == "worker_lost"
    stream.close()
    with pytest.raises(openai.InternalServerError) as refused:
        client.completions.create(model=MODEL, prompt="Hello", max_tokens=1)
    assert refused.value.status_code == 503
    wait_until(pair.is_ready, "serving again", RESTART_SECONDS, pair.output)
    assert pair.groups()[0]["restarts"] >= 1
