"""docs/configuration.md: complete, as the code is, and its defaults those that hold."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer.main

from engines.config import ModelConfig, load
from engines.config_help import HELP
from engines.config_schema import SECTIONS
from gateway import cli, reference

ROOT = Path(__file__).parents[2]
SPLITS = {
    "alone": "",
    "tp": "parallelType: tp\nparallelLevel: 2\n",
    "pp": "parallelType: pp\nparallelLevel: 2\n",
    "custom": "parallelType: custom\nparallelLevel: 2\n",
    "on GPUs": "deviceType: gpu\nparallelType: pptp\ntensorParallel: 2\npipelineParallel: 2\n",
}
DEFAULTS = {name: help.default for name, help in HELP.items() if help.default is not None}


def test_the_document_is_up_to_date() -> None:
    """`python -m gateway.reference` writes it."""
    assert (ROOT / "docs/configuration.md").read_text() == reference.markdown()


def test_every_key_is_in_it_once_with_what_it_does_or_why_it_does_not() -> None:
    first_cells = re.findall(r"^\| `([^-`][^`]*)` \|", reference.markdown(), re.MULTILINE)
    assert sorted(first_cells) == sorted(reference.KEYS)
    idle = {name for name, key in reference.KEYS.items() if key.ignored or key.refused}
    assert idle | HELP.keys() == reference.KEYS.keys()
    assert not idle & HELP.keys()
    assert all(help.text for help in HELP.values())


def test_every_option_of_serve_is_in_it_and_says_what_it_does() -> None:
    rows = re.findall(r"^\| `--([^`]*)`.*\| ([^|]*) \|$", reference.markdown(), re.MULTILINE)
    assert all(text for _, text in rows)
    known = typer.main.get_command(cli.app).commands["serve"].params  # type: ignore[attr-defined]
    asked = {option for each in known for option in each.opts if option.startswith("--")}
    assert {f"--{name}" for name, _ in rows} == asked
    assert len(rows) == len(asked) > 30


def test_its_tables_have_as_many_cells_in_each_row() -> None:
    tables = re.findall(r"(?:^\|.*\n)+", reference.markdown(), re.MULTILINE)
    assert len(tables) > 10
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1, table


def resolved(file: Path, text: str) -> dict[str, object]:
    """What a file comes to, but for where its keys stand."""
    file.write_text(text)
    config: ModelConfig = load(file, num_gpus=4)
    return config.model_dump(exclude={"places", "warnings"})


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("key", DEFAULTS)
def test_a_default_that_is_written_down_changes_nothing(tmp_path: Path, split: str, key: str) -> None:
    file, base = tmp_path / "model-config.yaml", "modelName: m\n" + SPLITS[split]
    section, _, name = key.rpartition(".")
    line = f"{name}: {reference.yaml(DEFAULTS[key])}\n"
    written = f"{base}{section}:\n  {line}" if section in SECTIONS else base + line
    assert resolved(file, written) == resolved(file, base)


@pytest.mark.parametrize("key", [name for name in DEFAULTS if type(DEFAULTS[name]) in (int, float)])
def test_another_value_than_the_default_would_be_seen(tmp_path: Path, key: str) -> None:
    """So the test above can tell."""
    file, section, name = tmp_path / "model-config.yaml", *key.rpartition(".")[::2]
    other = DEFAULTS[key] * 2 or 1 if key != "gpuMemoryShare" else 0.5  # type: ignore[operator]
    line = f"{name}: {other}\n"
    base = "modelName: m\n"
    changed = resolved(file, base + (f"{section}:\n  {line}" if section else line))
    assert changed != resolved(file, base)
