"""The layers of the house, walked over the source: who may import whom."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("gateway", "engines", "conversion")

TORCH_FREE_RUNTIME = (
    "plan",
    "block_tables",
    "chunk",
    "pace",
    "pages_ahead",
    "plan_builder",
    "prompt_lookup",
    "sequence",
    "intake",
    "outcome",
    "faults",
    "blocks",
    "scheduler",
    "static",
    "inbox",
    "grammar",
)
HEAVY = ("torch", "transformers", "deepspeed", "accelerate")


def modules() -> dict[str, Path]:
    """Every module of ours by its dotted name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports_of(path: Path) -> set[str]:
    """Dotted names that a file imports, anywhere in it, for types only or not."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: import by absolute name"
            assert node.module
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def under(name: str, *prefixes: str) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


@dataclass(frozen=True)
class Layer:
    """The modules under `members` (less `without`) import nothing of ours but `ours`, and none of `never`."""

    members: tuple[str, ...]
    ours: tuple[str, ...]
    never: tuple[str, ...] = ()
    without: tuple[str, ...] = ()

    def holds(self, module: str) -> bool:
        return under(module, *self.members) and not under(module, *self.without)


# DESIGN.md, section 2. `engines.config*` are the parts that engines.config is made of.
CONFIG = tuple(name for name in MODULES if name.startswith("engines.config"))
# engines.guard (standard library only) knows what a group leaves behind, for both to remove
# engines.modelfit (torch-free) says before a start what the engines would refuse after it
SHARED = (
    "engines.wire",
    "engines.bounds",
    "engines.registry",
    "engines.modeldir",
    "engines.modelfit",
    "engines.guard",
    "engines.garbage",
    *CONFIG,
)
SCHEDULING = tuple(f"engines.runtime.{name}" for name in TORCH_FREE_RUNTIME)
GENERATION = tuple(
    f"gateway.{name}"
    for name in (
        "generation",
        "conversation",
        "prompts",
        "scoring",
        "sequences",
        "sequence_stream",
        "choice",
        "direct",
        "merge",
        "recovery",
        "admission",
        "tenant",
    )
)
HELPER = ("gateway.helper", "gateway.helper_process")  # processes that the kernel bounds
WEB = ("fastapi", "starlette", "uvicorn", "sse_starlette")

LAYERS = {
    "wire": Layer(("engines.wire",), ()),
    "bounds": Layer(("engines.bounds",), (), HEAVY),
    "config": Layer(CONFIG, ("engines.registry", "engines.modeldir", *CONFIG), HEAVY),
    "registry": Layer(("engines.registry",), ()),
    "guard": Layer(("engines.guard",), ()),
    "garbage": Layer(("engines.garbage",), ()),
    "protocol": Layer(("gateway.protocol",), ("gateway.protocol", "engines.bounds"), WEB),
    "prompt": Layer(("gateway.prompt",), ("gateway.prompt", *HELPER), WEB),
    "answer": Layer(("gateway.answer",), ("gateway.answer", "gateway.prompt"), WEB),
    "workers": Layer(("gateway.workers",), ("gateway.workers", "gateway.errors", *SHARED), WEB),
    "generation": Layer(
        GENERATION,
        (
            *GENERATION,
            "gateway.prompt",
            "gateway.protocol.common",
            "gateway.router",
            "gateway.errors",
            "gateway.metrics",
            "gateway.workers.protocol",
            "engines.wire",
        ),
        WEB,
    ),
    "gateway": Layer(("gateway",), ("gateway", "conversion", *SHARED), HEAVY),
    "scheduling": Layer(SCHEDULING, (*SCHEDULING, "engines.wire", "engines.bounds"), HEAVY),
    "runtime": Layer(
        ("engines.runtime",),
        ("engines.runtime", "engines.gpu", "engines.wire", "engines.bounds", "engines.base", *CONFIG),
    ),
    "gpu": Layer(("engines.gpu",), ("engines.gpu",)),
    "engines": Layer(("engines",), ("engines",)),
    "conversion": Layer(
        ("conversion",), ("conversion", "engines.models", "engines.base", "engines.modeldir", *CONFIG)
    ),
}


def ours(names: set[str]) -> Iterator[str]:
    """Those of `names` that are modules of ours, `from package import module` resolved."""
    return (name for name in names if name in MODULES and name not in PACKAGES)


@pytest.mark.parametrize("name", LAYERS)
def test_layer_imports_only_what_is_below_it(name: str) -> None:
    layer = LAYERS[name]
    wrong = []
    for module, path in MODULES.items():
        if not layer.holds(module):
            continue
        names = imports_of(path)
        allowed = (*layer.ours, *_parents(layer.ours))
        wrong += [f"{module} imports {other}" for other in ours(names) if not _allowed(other, layer, allowed)]
        wrong += [f"{module} imports {other}" for other in sorted(names) if under(other, *layer.never)]
    assert not wrong


def _parents(names: tuple[str, ...]) -> set[str]:
    """Packages on the way to `names`: their __init__ is empty, importing them is importing nothing."""
    return {name.rsplit(".", 1)[0] for name in names if "." in name} - set(names)


def _allowed(other: str, layer: Layer, allowed: tuple[str, ...]) -> bool:
    return under(other, *layer.ours) or other in allowed


def engine_modules() -> list[str]:
    """engines/<engine>.py: the modules that define a class with a `batching` of its own."""
    from engines import registry

    return sorted({engine.target.split(":")[0] for engine in registry.ENGINES.values()} & set(MODULES))


def test_an_engine_imports_no_other_engine_and_no_policy() -> None:
    engines = engine_modules()
    assert "engines.native" in engines
    allowed = ("engines.base", "engines.models", "engines.runtime.context", "engines.runtime.attention")
    allowed += ("engines.runtime.mesh", *CONFIG)
    for engine in engines:
        names = set(ours(imports_of(MODULES[engine]))) - {"engines", "engines.runtime"}
        assert not [name for name in names if not under(name, *allowed, engine)], engine


def test_init_files_are_empty() -> None:
    files = [path for path in MODULES.values() if path.name == "__init__.py"]
    assert files
    assert [path for path in files if path.read_text().strip()] == []


@pytest.mark.parametrize("module", MODULES)
def test_no_error_is_swallowed_in_silence(module: str) -> None:
    """`except: pass` hides; contextlib.suppress names what it expects."""
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ExceptHandler):
            silent = all(isinstance(statement, ast.Pass) for statement in node.body)
            assert not silent, f"{MODULES[module]}:{node.lineno}"
            assert node.type is not None, f"{MODULES[module]}:{node.lineno}: name the exceptions"


def torch_free_modules() -> list[str]:
    """All of the gateway, and what it shares with the engines."""
    free = [name for name in MODULES if under(name, "gateway", *SHARED, *SCHEDULING, "engines.guard")]
    return sorted(set(free) - {"gateway"})


def run_python(program: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-c", program]
    return subprocess.run(argv, capture_output=True, text=True, timeout=60, cwd=ROOT)


def test_importing_the_gateway_leaves_torch_out() -> None:
    """One fresh process imports every torch-free module; none may have pulled torch in, even indirectly."""
    names = torch_free_modules()
    assert {"gateway.app", "gateway.cli", "engines.wire", "engines.runtime.scheduler"} <= set(names)
    program = (
        "import importlib, sys\n"
        f"for name in {names!r}:\n"
        "    importlib.import_module(name)\n"
        f"    heavy = [m for m in {HEAVY!r} if m in sys.modules]\n"
        "    assert not heavy, f'importing {name} has imported {heavy}'\n"
    )
    result = run_python(program)
    assert result.returncode == 0, result.stderr


def test_the_command_line_starts_light() -> None:
    """`sluice --help` has no use for a web framework: what is slow to import waits for who needs it."""
    program = (
        "import sys, gateway.cli\n"
        "print([m for m in ('fastapi', 'uvicorn', 'pydantic', 'httpx', 'tokenizers', 'rich.progress')"
        " if m in sys.modules])"
    )
    result = run_python(program)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr
