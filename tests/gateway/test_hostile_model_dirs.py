"""Model directories are somebody else's: what is odd in one is refused by name, and nothing in it is run."""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gateway.prompt.model_files import BadModelFile
from gateway.prompt.template import BadTemplate
from tests.gateway.serving import make_model_dir, make_served

CANARY = "import pathlib; pathlib.Path({path!r}).write_text('run')\n"
CODE_FILES = (
    "tokenization_x.py",
    "modeling_x.py",
    "json.py",
    "jinja2.py",
    "sitecustomize.py",
    "__init__.py",
    "conftest.py",
)


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    return make_model_dir(directory)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
@pytest.mark.parametrize("target", ["/etc/passwd", "/dev/zero", "/dev/stdin", "../outside", "/nonexistent"])
def test_links_do_not_lead_out_of_the_directory(model_dir: Path, name: str, target: str) -> None:
    (model_dir.parent / "outside").write_bytes((model_dir / "tokenizer.json").read_bytes())
    (model_dir / name).unlink(missing_ok=True)
    (model_dir / name).symlink_to(target)
    with pytest.raises(BadModelFile, match=f"{name}: is a link that leads out"):
        make_served(model_dir)


def test_links_into_the_hubs_cache_are_followed(model_dir: Path) -> None:
    snapshot, blobs = model_dir.parent / "hub" / "snapshots" / "abc", model_dir.parent / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(model_dir.iterdir()):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert make_served(snapshot).template is not None


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
@pytest.mark.parametrize(
    "make",
    [os.mkfifo, os.mkdir, lambda path: os.truncate(os.open(path, os.O_CREAT | os.O_WRONLY), 1 << 40)],
    ids=["fifo", "directory", "terabyte"],
)
def test_only_regular_files_of_a_sane_size_are_read(
    model_dir: Path, name: str, make: Callable[[Path], None]
) -> None:
    (model_dir / name).unlink(missing_ok=True)
    make(model_dir / name)
    with pytest.raises(BadModelFile, match=name):
        make_served(model_dir)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"chat_template": ' * 5_000,
        b"\x80\x04\x95cos\nsystem\n",
        b'{"a": 1',
    ],
)
def test_a_bad_configuration_names_its_file(model_dir: Path, content: bytes) -> None:
    (model_dir / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(BadTemplate, match=r"tokenizer_config\.json"):
        make_served(model_dir)


@pytest.mark.parametrize(
    "template",
    [
        "{% if %}",
        "{{ x | shell }}",
        "{% if x is evil %}{% endif %}",
        "(" * 50 + "{{" + "(" * 50_000,
        "x" * (1 << 20) + "x",
    ],
    ids=["syntax", "filter", "test", "deep", "long"],
)
def test_a_bad_template_is_refused_when_it_is_loaded(model_dir: Path, template: str) -> None:
    (model_dir / "chat_template.jinja").write_text(template)
    with pytest.raises(BadTemplate, match=r"chat_template\.jinja"):
        make_served(model_dir)


def test_a_template_is_not_computed_when_it_is_loaded(model_dir: Path) -> None:
    (model_dir / "chat_template.jinja").write_text("{{ 10 ** (10 ** 9) }}{{ 'x' | center(10 ** 11) }}")
    assert make_served(model_dir).template is not None  # at once: it is for the render process to suffer


def test_damaged_tokenizers_are_refused_or_work(model_dir: Path) -> None:
    draw = random.Random(5)
    path = model_dir / "tokenizer.json"
    whole = path.read_bytes()
    refusals = []
    for _ in range(200):
        damaged = bytearray(whole)
        for _ in range(draw.choice((1, 3, 30))):
            at = draw.randrange(len(damaged))
            damaged[at : at + draw.randrange(3)] = draw.choice(
                (b"", b"0", b'"', b"}", b"null", b"-1", b"\xff")
            )
        path.write_bytes(damaged)
        try:
            model = make_served(model_dir)
        except BadModelFile as error:
            refusals.append(str(error))
        else:
            model.tokenizer.decode(model.tokenizer.encode("Hello world", add_special_tokens=True))
    assert len(refusals) > 20
    assert all(str(path) in refusal for refusal in refusals)


def test_code_beside_a_model_is_never_imported(model_dir: Path) -> None:
    canary = model_dir.parent / "canary"
    for name in CODE_FILES:
        (model_dir / name).write_text(CANARY.format(path=str(canary)))
    config = json.loads((model_dir / "tokenizer_config.json").read_text())
    config |= {
        "tokenizer_class": "X",
        "trust_remote_code": True,
        "auto_map": {"AutoTokenizer": ["tokenization_x.X", None], "AutoModel": "modeling_x.X"},
    }
    (model_dir / "tokenizer_config.json").write_text(json.dumps(config))
    before = set(sys.modules)
    model = make_served(model_dir)
    assert model.tokenizer.encode("hi", add_special_tokens=False)
    assert not {name for name in set(sys.modules) - before if "_x" in name}
    assert not canary.exists()
