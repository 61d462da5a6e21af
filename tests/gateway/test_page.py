"""The chat page: what is served, how and to whom; and that the built files are those of the sources."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import httpx
import pytest

from gateway.routes import page
from gateway.settings import Settings
from tests.gateway.serving import listening, make_app, make_group

ROOT = Path(__file__).parents[2]
WEB = ROOT / "web"
TYPES = {
    "/": "text/html; charset=utf-8",
    "/page.js": "text/javascript; charset=utf-8",
    "/page.css": "text/css; charset=utf-8",
    "/page.svg": "image/svg+xml",
}
MAX_ZIPPED = 150_000  # bytes, all files together
OLDEST_NODE = 20


def node() -> str:
    """The command; skips the test where there is none that is new enough."""
    command = shutil.which("node")
    if command is None:
        pytest.skip("there is no node")
    version = subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout
    if int(version.lstrip("v").split(".")[0]) < OLDEST_NODE:
        pytest.skip(f"node {version.strip()} is older than {OLDEST_NODE}")
    return command


def client_of(model_dir: Path, settings: Settings) -> Iterator[httpx.Client]:
    with (
        listening(make_app(model_dir, make_group(model_dir), settings=settings)) as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def client(model_dir: Path) -> Iterator[httpx.Client]:
    """Of a server that wants keys; the client has none."""
    yield from client_of(model_dir, Settings(api_keys=("key",)))


@pytest.fixture
def client_without_page(model_dir: Path) -> Iterator[httpx.Client]:
    yield from client_of(model_dir, Settings(page=False))


def test_these_are_the_paths() -> None:
    assert {path.decode() for path in page.PATHS} == TYPES.keys()


@pytest.mark.parametrize("path", TYPES)
@pytest.mark.parametrize("encoding", ["gzip", "identity"])
def test_served_without_a_key(client: httpx.Client, path: str, encoding: str) -> None:
    response = client.get(path, headers={"accept-encoding": encoding})
    name = path.strip("/") or "index.html"
    assert response.status_code == 200
    assert response.content == files("gateway").joinpath("web", name).read_bytes()
    assert response.headers["content-type"] == TYPES[path]
    assert response.headers.get("content-encoding", "identity") == encoding
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["vary"] == "accept-encoding"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize(
    ("accepted", "is_zipped"),
    [
        ("gzip", True),
        ("br, gzip;q=0.5", True),
        ("GZIP , br", True),
        ("", False),
        ("br", False),
        ("gzip;q=0", False),
        ("gzip; q=0.000, br", False),
        ("x-gzipped", False),
    ],
)
def test_zipped_for_who_takes_it(client: httpx.Client, accepted: str, is_zipped: bool) -> None:
    response = client.get("/page.css", headers={"accept-encoding": accepted})
    assert ("content-encoding" in response.headers) == is_zipped


@pytest.mark.parametrize("path", TYPES)
def test_policy(client: httpx.Client, path: str) -> None:
    policy = client.get(path).headers["content-security-policy"]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'"
    assert {rules[f"{kind}-src"] for kind in ("script", "style", "connect", "img")} == {"'self'"}
    assert {rules[name] for name in ("base-uri", "form-action", "frame-ancestors")} == {"'none'"}
    assert rules["require-trusted-types-for"] == "'script'"
    assert "unsafe" not in policy


@pytest.mark.parametrize("path", TYPES)
def test_who_has_a_file_is_not_sent_it_again(client: httpx.Client, path: str) -> None:
    etag = client.get(path).headers["etag"]
    for known in (etag, f'"other", {etag}', "*"):
        response = client.get(path, headers={"if-none-match": known})
        assert (response.status_code, response.content) == (304, b"")
        assert response.headers["etag"] == etag
    assert client.get(path, headers={"if-none-match": '"other"'}).status_code == 200


@pytest.mark.parametrize("path", TYPES)
def test_head(client: httpx.Client, path: str) -> None:
    head, get = client.head(path), client.get(path)
    assert (head.status_code, head.content) == (200, b"")
    for name in ("content-length", "content-type", "etag", "content-security-policy"):
        assert head.headers[name] == get.headers[name]


def test_nothing_else_is_open(client: httpx.Client) -> None:
    for path in ("/page", "/page.js/", "/web/page.js", "/page.map", "/v1/models"):
        assert client.get(path).status_code == 401, path
    assert client.post("/").status_code == 401
    assert client.get("/?anything").status_code == 200


def test_switched_off(client_without_page: httpx.Client) -> None:
    for path in TYPES:
        response = client_without_page.get(path)
        assert response.status_code == 404
        assert "error" in response.json()
    assert client_without_page.get("/v1/models").status_code == 200


def test_the_page_needs_nothing_from_elsewhere_and_no_inline_code() -> None:
    html = files("gateway").joinpath("web", "index.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert sorted(sources) == ["page.css", "page.js", "page.svg"]
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?! src)", html)


def test_small() -> None:
    sizes = {path: len(page._read(path).zipped) for path in TYPES}
    assert sum(sizes.values()) < MAX_ZIPPED, sizes


def test_the_package_has_the_files() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"][
        "gateway"
    ]
    packaged = {found.name for pattern in patterns for found in (ROOT / "gateway").glob(pattern)}
    assert {path.strip("/") or "index.html" for path in TYPES} <= packaged


def test_the_lockfile_names_no_registry() -> None:
    assert '"resolved"' not in (WEB / "package-lock.json").read_text()


def test_the_page_s_modules() -> None:
    tests = sorted(str(path) for path in (WEB / "test").glob("*.test.mjs"))
    assert tests
    run = subprocess.run([node(), "--test", *tests], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.skipif(not (WEB / "node_modules").is_dir(), reason="web/node_modules is not there: `make page`")
def test_the_built_files_are_those_of_the_sources(tmp_path: Path) -> None:
    subprocess.run([node(), WEB / "build.mjs", tmp_path], check=True, capture_output=True, timeout=300)
    for path in TYPES:
        name = path.strip("/") or "index.html"
        built, committed = (tmp_path / name).read_bytes(), files("gateway").joinpath("web", name).read_bytes()
        assert built == committed, f"gateway/web/{name} is not what web/ builds: run `make page`"
