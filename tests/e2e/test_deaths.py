"""Processes killed under a running server of two ranks. One server for all: each death is recovered from."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import openai
import psutil
import pytest

from tests.e2e.server import MODEL, Server, events, serving, wait_until
from tests.soak import kills

RESTART_SECONDS = 240.0  # a bound: back-off, torchrun, load
BODY: dict[str, object] = {"max_tokens": 1000, "ignore_eos": True}
GREEDY: dict[str, object] = {"temperature": 0}
SEEDED: dict[str, object] = {"temperature": 1, "seed": 7}
CONSTRAINED = {
    **SEEDED,
    "ignore_eos": False,
    "structured_outputs": {"regex": "([a-z]{3,9} [0-9]{2,5}, ){40}"},
}


@pytest.fixture(scope="module")
def pair() -> Iterator[Server]:
    """In float32, where a token does not depend on how its K/V was computed."""
    with serving("--tp", "2", "--dtype", "float32") as server:
        yield server
        assert server.stop() == 0, server.output()
        assert server.run_dirs() == []


def leader(server: Server) -> psutil.Process:
    return server.workers()[0]


def follower(server: Server) -> psutil.Process:
    return server.workers()[1]


def launcher(server: Server) -> psutil.Process:
    return server.torchrun()


@pytest.mark.parametrize(
    ("victim", "sampling"),
    [(leader, GREEDY), (follower, SEEDED), (launcher, GREEDY), (leader, CONSTRAINED)],
    ids=["leader-greedy", "follower-seeded", "launcher-greedy", "leader-constrained"],
)
def test_a_stream_goes_on_with_the_same_tokens(
    pair: Server, victim: Callable[[Server], psutil.Process], sampling: dict[str, object]
) -> None:
    wait_until(pair.is_ready, "ready", RESTART_SECONDS, pair.output)
    expected = pair.complete(**BODY | sampling).json()
    resumed = pair.metric("sluice:streams_resumed_total")
    old, doomed = pair.group_processes(), victim(pair)  # found before: an answer takes no longer than that
    assert len(old) >= 4  # guard, launcher, two ranks
    with pair.stream(**BODY | sampling, stream_options={"include_usage": True}) as lines:
        stream = events(lines)
        seen = [next(stream), next(stream)]
        doomed.kill()
        wait_until(lambda: not pair.is_ready(), "the death is noticed", 15, pair.output)
        refused = pair.complete()
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        seen += stream
    *chunks, usage, done = seen
    assert done == {"done": True}
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == expected["choices"][0]["text"]  # type: ignore[index]
    assert usage["usage"] == expected["usage"] | {
        "prompt_tokens_details": usage["usage"]["prompt_tokens_details"]
    }  # type: ignore[index]
    assert pair.metric("sluice:streams_resumed_total") == resumed + 1
    _, alive = psutil.wait_procs(old, timeout=10)
    assert alive == []  # the whole group went, not only the one that was killed
    assert len(pair.run_dirs()) == 1


def test_without_waiting_the_sdk_raises_and_the_group_comes_back() -> None:
    with serving("--recovery-wait", "0") as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        stream = client.completions.create(
            model=MODEL, prompt="Hello", max_tokens=1900, stream=True, extra_body={"ignore_eos": True}
        )
        next(stream)
        leader(server).kill()
        with pytest.raises(openai.APIError) as error:
            list(stream)
        assert error.value.code == "worker_lost"
        stream.close()
        with pytest.raises(openai.InternalServerError) as refused:
            client.completions.create(model=MODEL, prompt="Hello", max_tokens=1)
        assert refused.value.status_code == 503
        wait_until(server.is_ready, "serving again", RESTART_SECONDS, server.output)
        assert server.metric("sluice:recovery_failed_total", reason="timeout") == 1
        assert server.groups()[0]["restarts"] == 1


def check(figures: kills.Figures, num_kills: int) -> None:
    """Of kills at moments that nobody chose: no answer hangs, and none is another one."""
    print(figures.summary())
    assert sum(figures.kills.values()) >= num_kills
    assert figures.wrong == []
    assert figures.answers["the same"] > num_kills
    assert figures.resumed_greedy > 0 < figures.resumed_seeded
    assert len(figures.refusals) > 0


def test_forty_kills_of_fake_groups() -> None:
    check(kills.fake_kills(40, num_beds=2), 40)


def test_six_kills_of_real_groups() -> None:
    check(kills.real_kills(6), 6)
