"""Hub ids: what is downloaded, and how each way of failing is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from engines.config import ConfigError
from gateway.model_source import resolve


class FakeHub:
    """Stands for snapshot_download: gives a directory, or raises."""

    def __init__(self, result: Path | Exception) -> None:
        self.result = result
        self.calls: list[dict[str, Any]] = []

    def __call__(self, repo_id: str, **options: Any) -> str:
        self.calls.append({"repo_id": repo_id, **options})
        if isinstance(self.result, Exception):
            raise self.result
        return str(self.result)


def install(monkeypatch: pytest.MonkeyPatch, result: Path | Exception) -> FakeHub:
    hub = FakeHub(result)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    return hub


def refusal(kind: type[GatedRepoError] | type[RepositoryNotFoundError]) -> Exception:
    response = httpx.Response(404, request=httpx.Request("GET", "http://hub.invalid/"))
    return kind("no", response=response)  # type: ignore[arg-type]


def test_a_hub_id_is_downloaded_without_pickles_and_keeps_its_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    hub = install(monkeypatch, tmp_path)
    config = resolve("org/name@v1.0", {"tp": 2})
    assert (config.model_name, config.model_path, config.tp_size) == ("org/name", str(tmp_path), 2)
    (call,) = hub.calls
    assert (call["repo_id"], call["revision"]) == ("org/name", "v1.0")
    assert {pattern.rpartition(".")[2] for pattern in call["allow_patterns"]} == {
        "json",
        "safetensors",
        "jinja",
        "model",
    }


def test_a_repository_of_pickles_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    install(monkeypatch, tmp_path)
    with pytest.raises(ConfigError, match="no safetensors"):
        resolve("org/name", {})


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (refusal(GatedRepoError), "is gated; .*HF_TOKEN"),
        (refusal(RepositoryNotFoundError), "neither on the hub nor a directory"),
        (LocalEntryNotFoundError("Got: ConnectError"), "cannot be reached; .*local directory.*HF_TOKEN"),
        (OSError("disk full"), "disk full"),
    ],
)
def test_each_failure_is_one_problem(monkeypatch: pytest.MonkeyPatch, error: Exception, words: str) -> None:
    install(monkeypatch, error)
    with pytest.raises(ConfigError, match=f"(?s)org/name.*{words}") as caught:
        resolve("org/name", {})
    assert len(caught.value.problems) == 1


def test_a_path_in_a_directory_that_exists_is_not_looked_up_on_the_hub(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub = install(monkeypatch, tmp_path)
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="neither a directory nor a file"):
        resolve("models/llama", {})
    assert hub.calls == []


def test_one_file_of_a_model_is_answered_with_its_directory(tmp_path: Path) -> None:
    (tmp_path / "consolidated.00.pth").write_bytes(b"PK")
    with pytest.raises(
        ConfigError, match=rf"is one file of a model; remedy: give its directory: {tmp_path}$"
    ):
        resolve(str(tmp_path / "consolidated.00.pth"), {})
