"""Names to engines: ours, plug-ins by entry point, and a clear refusal of the rest."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from engines import registry
from engines.config import load
from engines.registry import Ours


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An installed distribution that offers the engine "other"."""
    (tmp_path / "other_engine.py").write_text("class OtherEngine:\n    batching = 'continuous'\n")
    info = tmp_path / "other_engine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other-engine\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[sluice.engines]\nother = other_engine:OtherEngine\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return "other"


def test_ours_are_listed_and_load() -> None:
    assert "native" in registry.names()
    assert registry.load("native").__name__ == "NativeEngine"


@pytest.mark.parametrize("name", registry.ENGINES)
def test_what_is_known_before_the_import_is_true(name: str) -> None:
    assert (registry.load(name).batching == "static") == registry.is_static(name)


def test_one_line_adds_an_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.ENGINES, "echo", Ours("engines.echo:EchoEngine"))
    file = tmp_path / "model-config.yaml"
    for kind in ("tp", "pp"):
        file.write_text(f"engine: echo\nparallelType: {kind}\nparallelLevel: 2\nbatchSize: 4\n")
        config = load(file, num_gpus=0)
        assert config.engine == "echo"
        assert any("batchSize: has no effect: engine echo batches" in line for line in config.warnings)


def test_a_plugin_is_listed_and_loads(plugin: str) -> None:
    assert plugin in registry.names()
    assert registry.load(plugin).__name__ == "OtherEngine"


def test_unknown_engine_names_those_there_are() -> None:
    with pytest.raises(
        registry.UnknownEngine, match=r"'natve' is not in this version.*mean 'native'.*remedy"
    ):
        registry.load("natve")


def test_names_import_no_torch() -> None:
    code = "import sys; from engines import registry; registry.names(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
