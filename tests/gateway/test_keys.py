"""API keys from options and files, their limits over HTTP, and whom a prefix cache is shared with."""

from __future__ import annotations

import asyncio
import os
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import pytest
from typer.testing import CliRunner

from gateway import cli, keys
from gateway.app import create_app
from gateway.keys import BadKeyFile, KeyRing
from gateway.settings import Settings
from gateway.tenant import Limits, RateLimited, Tenant
from tests.gateway.groups import until
from tests.gateway.serving import client_of, make_app, make_group, make_served

RAW: dict[str, Any] = {"model": "demo", "prompt": "Hello world", "max_tokens": 5}
anyio = pytest.mark.anyio


def key_file(directory: Path, text: str, mode: int = 0o600) -> Path:
    path = directory / "keys.yaml"
    path.write_text(text)
    path.chmod(mode)
    return path


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


# Files


def test_a_made_key_opens_and_its_line_does_not_show_it(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.app, ["key", "007"])
    assert result.exit_code == 0
    made, line = result.stderr.strip(), result.stdout
    assert made not in line
    assert len(made) > 40
    ring = KeyRing(file=key_file(tmp_path, line))
    tenant = ring.find(made.encode())
    assert tenant is not None
    assert tenant.name == "007"
    assert ring.find(made[:-1].encode()) is None
    assert ring.find(line.encode()) is None


def test_a_key_has_a_name_that_is_one() -> None:
    result = CliRunner().invoke(cli.app, ["key", "a b"])
    assert result.exit_code == 1
    assert "name: must be" in result.stderr
    assert result.stdout == ""


def test_a_list_has_names_and_limits(tmp_path: Path) -> None:
    digest = keys.digest_of(b"key-of-bob-0123456789").hex()
    file = key_file(
        tmp_path,
        "# who may ask\n"
        "- name: alice\n  key: key-of-alice-0123456789\n  concurrentRequests: 2\n  tokensPerMinute: 100\n"
        f"- {{name: bob, sha256: {digest}, requestsPerMinute: 3}}\n",
    )
    assert keys.read_key_file(file) == [
        keys.ApiKey(
            "alice",
            keys.digest_of(b"key-of-alice-0123456789"),
            Limits(concurrent_requests=2, tokens_per_minute=100),
        ),
        keys.ApiKey("bob", bytes.fromhex(digest), Limits(requests_per_minute=3)),
    ]


def test_a_plain_list_has_a_key_or_a_digest_a_line(tmp_path: Path) -> None:
    digest = keys.digest_of(b"second").hex()
    read = keys.read_key_file(key_file(tmp_path, f"first\n\n# a comment\nsha256:{digest}\n"))
    assert [key.digest for key in read] == [keys.digest_of(b"first"), keys.digest_of(b"second")]
    assert read == keys.read_key_file(key_file(tmp_path, f"sha256:{keys.digest_of(b'first').hex()}\nsecond"))
    assert len({key.name for key in read}) == 2


CANARY = "canary-key-0123456789"


@pytest.mark.parametrize(
    ("text", "mode", "problem"),
    [
        ("", 0o600, "has no keys"),
        ("# nothing\n", 0o600, "has no keys"),
        (f"{CANARY}\n", 0o644, "can be read by other users"),
        (f"- {{name: a, key: {CANARY}}}\n", 0o640, "can be read by other users"),
        (f"{CANARY}\n", 0o622, "can be written by other users"),
        (f"- {{name: a, sha256: {'a' * 64}}}\n", 0o664, "can be written by other users"),
        (f"- {{name: a, key: {CANARY}, sha256: {'a' * 64}}}\n", 0o600, ":1: needs either sha256"),
        ("- {name: a}\n", 0o600, ":1: needs either sha256"),
        (
            f"- {{name: a, key: {CANARY}, rpm: 3}}\n",
            0o600,
            ":1: unknown field rpm; allowed: name, sha256, key, conc",
        ),
        (f"- {{name: a, key: {CANARY}, tokensPerMinute: 0}}\n", 0o600, "tokensPerMinute: must be a whole"),
        (f"- {{name: a, key: {CANARY}, tokensPerMinute: {CANARY}}}\n", 0o600, "tokensPerMinute: must be"),
        (f"- {{name: {CANARY * 9}, key: {CANARY}}}\n", 0o600, ":1: name: must be 1 to 64"),
        (
            f"# keys\n- name: a\n  key: {CANARY}\n  limit: 3\n",
            0o600,
            ":4: unknown field limit; allowed: name",
        ),
        (
            f"- {{name: a, key: {CANARY}1}}\n- nmae: b\n  key: {CANARY}2\n",
            0o600,
            ":2: unknown field nmae; all",
        ),
        (f"- {{name: a, {CANARY}: 3}}\n", 0o600, ":1: unknown field; allowed: name"),
        (f"- key: {CANARY}\n", 0o600, ":1: name is missing"),
        (f"first\n\nname: {CANARY}\n", 0o600, ":3: is not a key, for it holds spaces"),
        (f"keys:\n- key: {CANARY}\n", 0o600, ":2: is not a key"),
        ("- {name: a, key: short}\n", 0o600, "key: must be 16 characters or more"),
        (f"- {{name: a, sha256: {CANARY}}}\n", 0o600, "sha256: must be 64 hexadecimal digits"),
        (f"sha256:{CANARY}\n", 0o600, ":1: sha256: must be 64 hexadecimal digits"),
        (f"- {CANARY}\n", 0o600, ":1: is not a mapping"),
        (f"- {{name: a, key: {CANARY}\n", 0o600, "is not valid YAML"),
        ("---\n", 0o600, "is not a list of keys"),
        (f"---\n{CANARY}: 1\n", 0o600, "is not a list of keys"),
        (f"- {{name: a, key: {CANARY}1}}\n- {{name: a, key: {CANARY}2}}\n", 0o600, "two keys are named a"),
        (
            f"- {{name: a, key: {CANARY}}}\n- {{name: b, key: {CANARY}}}\n",
            0o600,
            "of b is there twice",
        ),
        (f"- !!python/object/apply:os.system [{CANARY}]\n", 0o600, "is not valid YAML"),
    ],
)
def test_a_file_that_is_wrong_is_refused_and_no_key_is_shown(
    tmp_path: Path, text: str, mode: int, problem: str
) -> None:
    path = key_file(tmp_path, text, mode)
    with pytest.raises(BadKeyFile) as caught:
        KeyRing(file=path)
    assert problem in str(caught.value)
    assert str(path) in str(caught.value)
    assert CANARY not in str(caught.value)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadKeyFile, match="No such file"):
        KeyRing(file=tmp_path / "nothing")
    with pytest.raises(BadKeyFile, match="Is a directory"):
        KeyRing(file=tmp_path)
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe")
    with pytest.raises(BadKeyFile, match="UTF-8"):
        KeyRing(file=binary)
    with (
        mock.patch("gateway.keys.os.geteuid", return_value=os.geteuid() + 1),
        mock.patch("gateway.keys.os.fstat", return_value=os.stat_result([0o100600, 0, 0, 0, 4242, *[0] * 5])),
        pytest.raises(BadKeyFile, match="belongs to another user"),
    ):
        KeyRing(file=key_file(tmp_path, "key"))


def test_digests_may_be_read_by_others(tmp_path: Path) -> None:
    assert len(keys.read_key_file(key_file(tmp_path, f"- {{name: a, sha256: {'a' * 64}}}\n", 0o644))) == 1


def test_keys_come_and_go_while_it_runs(tmp_path: Path) -> None:
    file = key_file(tmp_path, "- {name: a, key: key-of-a-0123456789, requestsPerMinute: 2}\n")
    ring = KeyRing(["from-the-command-line"], file)
    before = ring.find(b"key-of-a-0123456789")
    assert before is not None
    with before.request():
        pass
    key_file(tmp_path, "- {name: a, key: another-of-a-01234567, requestsPerMinute: 2}\n")
    ring.reload()
    assert ring.find(b"key-of-a-0123456789") is None
    assert ring.find(b"another-of-a-01234567") is before
    assert before.headers()["x-ratelimit-remaining-requests"] == "1"  # a reload is no new minute
    assert ring.find(b"from-the-command-line") is not None
    key_file(tmp_path, "")
    with pytest.raises(BadKeyFile):
        ring.reload()
    assert ring.find(b"another-of-a-01234567") is before
    assert not ring.is_open


# Limits


def test_tokens_are_counted_when_they_are_known() -> None:
    tenant = Tenant("a", b"", Limits(tokens_per_minute=100))
    tenant.take_prompt(60)
    tenant.count_answer(70)  # no answer is cut short by it
    assert tenant.headers()["x-ratelimit-remaining-tokens"] == "0"
    with pytest.raises(RateLimited) as caught:
        tenant.take_prompt(1)
    assert 1 <= caught.value.retry_after <= 60
    with mock.patch("time.time", return_value=time.time() + 61):
        tenant.take_prompt(100)
        with pytest.raises(RateLimited):
            tenant.take_prompt(1)


def limited_app(model_dir: Path, tmp_path: Path, *groups: Any) -> Any:
    text = (
        "- {name: one, key: one-at-a-time-0123, concurrentRequests: 1}\n"
        "- {name: few, key: few-requests-01234, requestsPerMinute: 2}\n"
        "- {name: tok, key: few-tokens-0123456, tokensPerMinute: 20}\n"
    )
    return make_app(model_dir, *groups, settings=Settings(api_key_file=key_file(tmp_path, text)))


@anyio
async def test_requests_a_minute(model_dir: Path, tmp_path: Path) -> None:
    async with client_of(limited_app(model_dir, tmp_path, make_group(model_dir))) as client:
        answers = [
            await client.post("/v1/completions", json=RAW, headers=bearer("few-requests-01234"))
            for _ in range(3)
        ]
        assert [answer.status_code for answer in answers] == [200, 200, 429]
        remaining = [answer.headers["x-ratelimit-remaining-requests"] for answer in answers]
        assert remaining == ["1", "0", "0"]
        assert {answer.headers["x-ratelimit-limit-requests"] for answer in answers} == {"2"}
        assert all(1 <= int(a.headers["x-ratelimit-reset-requests"].removesuffix("s")) <= 60 for a in answers)
        assert 1 <= int(answers[2].headers["retry-after"]) <= 60
        error = answers[2].json()["error"]
        assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
        assert "2 requests a minute" in error["message"]
        looked = await client.get("/v1/models", headers=bearer("few-requests-01234"))
        assert looked.status_code == 200  # only what is asked of a model counts
        other = await client.post("/v1/completions", json=RAW, headers=bearer("one-at-a-time-0123"))
        assert other.status_code == 200
        assert "x-ratelimit-limit-requests" not in other.headers


@anyio
async def test_anthropic_s_headers_say_when_the_minute_ends(model_dir: Path, tmp_path: Path) -> None:
    body = {"model": "demo", "max_tokens": 1, "messages": [{"role": "user", "content": "hi"}]}
    started = datetime.now(UTC)
    async with client_of(limited_app(model_dir, tmp_path, make_group(model_dir))) as client:
        answers = [
            await client.post("/v1/messages", json=body, headers={"x-api-key": "few-requests-01234"})
            for _ in range(3)
        ]
        other = await client.post("/v1/completions", json=RAW, headers=bearer("few-requests-01234"))
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    prefix = "anthropic-ratelimit-requests"
    assert [answer.headers[f"{prefix}-remaining"] for answer in answers] == ["1", "0", "0"]
    assert {answer.headers[f"{prefix}-limit"] for answer in answers} == {"2"}
    for answer in answers:
        reset = datetime.fromisoformat(answer.headers[f"{prefix}-reset"])
        assert started <= reset <= datetime.now(UTC) + timedelta(seconds=61)
    assert f"{prefix}-limit" not in other.headers


@anyio
async def test_tokens_a_minute(model_dir: Path, tmp_path: Path) -> None:
    group = make_group(model_dir)
    async with client_of(limited_app(model_dir, tmp_path, group)) as client:

        async def ask(**fields: Any) -> httpx.Response:
            return await client.post(
                "/v1/completions", json=RAW | fields, headers=bearer("few-tokens-0123456")
            )

        first = (await ask()).json()["usage"]
        used = first["total_tokens"]
        assert 5 < used < 20
        second = await ask()
        assert second.headers["x-ratelimit-remaining-tokens"] == str(20 - 2 * used)  # known when it ended
        while (answer := await ask()).status_code == 200:
            pass
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        large = await ask(prompt="Hello world, how are you today? " * 10)
        assert (large.status_code, large.json()["error"]["code"]) == (429, "request_over_limit")
        assert large.headers["x-should-retry"] == "false"


@anyio
async def test_requests_at_once(model_dir: Path, tmp_path: Path) -> None:
    group = make_group(model_dir, waits_after=1)
    async with client_of(limited_app(model_dir, tmp_path, group)) as client:
        headers = bearer("one-at-a-time-0123")
        first = asyncio.create_task(client.post("/v1/completions", json=RAW, headers=headers))
        await until(lambda: group.num_outstanding == 1)
        second = await client.post("/v1/completions", json=RAW, headers=headers)
        assert (second.status_code, second.headers["retry-after"]) == (429, "1")
        group.go_on.set()
        assert (await first).status_code == 200
        assert (await client.post("/v1/completions", json=RAW, headers=headers)).status_code == 200
        bad = await client.post("/v1/completions", json={"model": "nope"}, headers=headers)
        assert bad.status_code in (400, 404)
        assert (await client.post("/v1/completions", json=RAW, headers=headers)).status_code == 200


# The prefix cache


@anyio
async def test_keys_share_no_prefix_with_each_other(model_dir: Path) -> None:
    group = make_group(model_dir)
    app = create_app(Settings(api_keys=("first-key", "second-key")), [make_served(model_dir, group)])
    async with client_of(app) as client:
        for key in ("first-key", "second-key"):
            await client.post("/v1/completions", json=RAW | {"n": 2}, headers=bearer(key))
        chat = {"model": "demo", "messages": [{"role": "user", "content": "hi"}], "prompt_cache_key": "x"}
        await client.post("/v1/chat/completions", json=chat, headers=bearer("first-key"))
    salts = [request.cache_salt for request in group.requests]
    assert salts[0] == salts[1] == salts[4]  # choices, and requests of one key, whatever they say
    assert salts[2] == salts[3] != salts[0]
    assert {len(salt) for salt in salts} == {32}


@anyio
async def test_a_prefix_is_known_to_this_run_only_and_shared_by_all_where_there_are_no_keys(
    model_dir: Path,
) -> None:
    salts = []
    for _ in range(2):
        group = make_group(model_dir)
        async with client_of(make_app(model_dir, group)) as client:
            await client.post("/v1/completions", json=RAW, headers=bearer("whatever"))
            await client.post("/v1/completions", json=RAW)
        salts.append({request.cache_salt for request in group.requests})
    assert [len(salt) for salt in salts] == [1, 1]
    assert salts[0] != salts[1]
