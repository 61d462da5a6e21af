"""What no module of ours may use, walked over the source; and that serving connects to nobody outside."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.server import serving
from tests.test_layers import MODULES, imports_of, under

UNPICKLERS = ("pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "jsonpickle", "joblib")
FORBIDDEN_CALLS = {
    "eval": "runs text",
    "exec": "runs text",
    "compile": "makes code of text",
    "__import__": "use importlib with a name of ours",
    "ast.literal_eval": "use json",
    "yaml.load": "use yaml.safe_load or compose with SafeLoader",
    "yaml.load_all": "use yaml.safe_load_all",
    "yaml.unsafe_load": "use yaml.safe_load",
    "yaml.full_load": "use yaml.safe_load",
    "torch.load": "unpickles",
    "jinja2.Environment": "use ImmutableSandboxedEnvironment",
    "Environment": "use ImmutableSandboxedEnvironment",
    "SandboxedEnvironment": "use ImmutableSandboxedEnvironment",
    "os.system": "use an argv list",
    "os.popen": "use an argv list",
    "subprocess.getoutput": "use an argv list",
    "subprocess.getstatusoutput": "use an argv list",
    "asyncio.create_subprocess_shell": "use an argv list",
    "tempfile.mktemp": "use mkstemp or mkdtemp",
    "np.load": "may unpickle",
    "numpy.load": "may unpickle",
    "dist.broadcast_object_list": "pickles",
    "dist.all_gather_object": "pickles",
    "dist.gather_object": "pickles",
    "dist.scatter_object_list": "pickles",
    "dist.send_object_list": "pickles",
    "dist.recv_object_list": "pickles",
}
FORBIDDEN_NAMES = {
    "yaml.Loader": "makes any object",
    "yaml.UnsafeLoader": "makes any object",
    "yaml.FullLoader": "makes objects",
}
FORBIDDEN_KEYWORDS = ("shell", "trust_remote_code", "allow_pickle")

# Pickled checkpoints go to the converter, which reads tensors and nothing else from them.
WEIGHTS_ONLY = ("conversion.pickled", "torch.load")


def dangers(module: str, tree: ast.AST) -> Iterator[str]:
    """What a module does that none may, by line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            keywords = {keyword.arg: keyword.value for keyword in node.keywords}
            true = [name for name, value in keywords.items() if _is_true(value)]
            if (module, called) == WEIGHTS_ONLY:
                if "weights_only" not in true:
                    yield f"{node.lineno}: torch.load without weights_only=True"
            elif called in FORBIDDEN_CALLS:
                yield f"{node.lineno}: {called}: {FORBIDDEN_CALLS[called]}"
            yield from (f"{node.lineno}: {name}=True" for name in true if name in FORBIDDEN_KEYWORDS)
        elif isinstance(node, ast.Attribute) and (name := ast.unparse(node)) in FORBIDDEN_NAMES:
            yield f"{node.lineno}: {name}: {FORBIDDEN_NAMES[name]}"


def _is_true(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and value.value is True


@pytest.mark.parametrize("module", MODULES)
def test_nothing_unpickles_or_runs_text(module: str) -> None:
    path = MODULES[module]
    assert not [name for name in imports_of(path) if under(name, *UNPICKLERS)]
    assert not list(dangers(module, ast.parse(path.read_text(encoding="utf-8"))))


@pytest.mark.parametrize(
    "source",
    [
        *(f"{call}(x)" for call in FORBIDDEN_CALLS),
        *FORBIDDEN_NAMES,
        "subprocess.run('ls', shell=True)",
        "AutoConfig.from_pretrained(path, trust_remote_code=True)",
        "np.fromfile(path, allow_pickle=True)",
        "async def f():\n    return [eval(x) for x in y]",
    ],
)
def test_each_danger_is_seen(source: str) -> None:
    assert list(dangers("gateway.any", ast.parse(source)))


@pytest.mark.parametrize("source", ["torch.load(x)", "torch.load(x, weights_only=False)"])
def test_the_one_exception_is_bound_to_its_condition(source: str) -> None:
    assert list(dangers("conversion.pickled", ast.parse(source)))
    assert not list(dangers("conversion.pickled", ast.parse("torch.load(x, weights_only=True)")))


# No connection leaves the machine. The trap is below Python: libuv's and gloo's calls go through it too.


@pytest.fixture(scope="module")
def trap(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler to make the trap with")
    library = tmp_path_factory.mktemp("trap") / "trap.so"
    source = Path(__file__).parent / "e2e" / "trap.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return library


OUTWARDS = """
import asyncio, socket, uvloop
address = ("192.0.2.1", 9)
async def connect(): await asyncio.open_connection(*address)
def datagram(): socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", address)
for attempt in (
    lambda: socket.create_connection(address),
    lambda: uvloop.run(connect()),
    lambda: socket.getaddrinfo("example.com", 80),
    lambda: socket.socket(socket.AF_INET6).connect(("2001:db8::1", 9)),
    datagram,
):
    try:
        attempt()
    except OSError as error:
        print(type(error).__name__)
"""


def test_the_trap_works(trap: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    environment = {**os.environ, "LD_PRELOAD": str(trap), "TRAP_LOG": str(log)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", OUTWARDS],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
        check=True,
    )
    refusals = ["PermissionError", "PermissionError", "gaierror", "PermissionError", "PermissionError"]
    assert done.stdout.split() == refusals
    calls = [(line.split()[0], *line.split()[2:]) for line in log.read_text().splitlines()]
    assert calls == [
        ("out", "connect", "192.0.2.1"),
        ("out", "connect", "192.0.2.1"),
        ("out", "getaddrinfo", "example.com"),
        ("out", "connect", "2001:db8::1"),
        ("out", "sendto", "192.0.2.1"),
    ]


@pytest.mark.slow
def test_serving_connects_to_nobody_outside(
    trap: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gateway and two real ranks, from their start to their end, under requests that name addresses."""
    log = tmp_path / "log"
    monkeypatch.setenv("LD_PRELOAD", str(trap))
    monkeypatch.setenv("TRAP_LOG", str(log))
    with serving("--tp", "2") as server:
        monkeypatch.undo()  # what the test itself does is not meant
        pids = {process.pid for process in server.workers().values()}
        assert len(pids) == 2
        assert server.complete(prompt="![x](http://192.0.2.1/x.png) http://example.com").status_code == 200
        for content in (
            "see https://example.com/a.png",
            [{"type": "image_url", "image_url": {"url": "http://192.0.2.1/x.png"}}],
            [{"type": "text", "text": "file:///etc/passwd and http://192.0.2.1/"}],
        ):
            message = {"role": "user", "content": content}
            body = {"model": "sluice-demo", "messages": [message], "max_tokens": 4}
            status = server.client.post("/v1/chat/completions", json=body).status_code
            assert status == (400 if "image_url" in str(content) else 200)
        assert server.stop() == 0
    lines = [line.split() for line in log.read_text().splitlines()]
    assert [line for line in lines if line[0] == "out"] == []
    seen = {int(line[1]) for line in lines}
    assert pids <= seen  # the ranks were in the trap: they connect to each other
