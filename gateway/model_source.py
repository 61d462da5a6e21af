"""What `sluice serve` was asked to serve: a directory, a model-config.yaml, a hub id, or the demo model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from engines.config import ConfigError, ModelConfig, Problem, load
from engines.config_errors import nearest
from engines.config_resolve import resolve_directory

DEMO_NAME = "sluice-demo"
WANTED_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model")  # never pickles
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")
UNWANTED_FILES = ("*/*",)  # other formats of the same weights live in folders

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")


def demo_directory() -> Path:
    """Where the demo model lies in the package."""
    return Path(__file__).parent / "demo_model"


def is_demo(config: ModelConfig) -> bool:
    return Path(config.model_path) == demo_directory()


def resolve(source: str | None, flags: Mapping[str, object]) -> ModelConfig:
    """The configuration of what `source` names; None is the demo model. `flags` as in engines.config.load.

    Raises ConfigError, also when a download fails."""
    if source is None:
        return resolve_directory(demo_directory(), {"model_name": DEMO_NAME, **flags}, None)
    path = Path(source)
    if path.is_file() and path.suffix in WEIGHT_SUFFIXES:
        raise _problem(source, "is one file of a model", f"give its directory: {path.absolute().parent}")
    if path.is_file() or path.suffix in (".yaml", ".yml"):
        return load(path, flags)
    if path.is_dir():
        return resolve_directory(path, flags, None)
    if not _HUB_ID.fullmatch(source) or path.parent.is_dir():
        raise _problem(source, "is neither a directory nor a file", _hint(path))
    name = source.partition("@")[0]
    return resolve_directory(download(source), {"model_name": name, **flags}, None)


def download(source: str) -> Path:
    """The local directory of a hub id, ORG/NAME or ORG/NAME@REVISION; downloaded if it is not there yet.

    Only configuration, tokenizer and safetensors files come. Raises ConfigError."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name, _, revision = source.partition("@")
    try:
        directory = Path(
            snapshot_download(
                name,
                revision=revision or None,
                allow_patterns=list(WANTED_FILES),
                ignore_patterns=list(UNWANTED_FILES),
            )
        )
    except GatedRepoError:
        raise _problem(source, "is gated", "accept its terms on the hub and set HF_TOKEN") from None
    except RevisionNotFoundError:
        raise _problem(source, f"has no revision {revision!r}", "name a branch, a tag or a commit") from None
    except RepositoryNotFoundError:
        raise _problem(
            source, "is neither on the hub nor a directory or file here", _hint(Path(name))
        ) from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        wrong = "is no directory here, has not been downloaded before, and the hub cannot be reached"
        raise _problem(source, wrong, _NO_NETWORK) from None
    except (OSError, ValueError) as error:
        raise _problem(source, f"cannot be downloaded: {_first_line(error)}", _LOCAL) from None
    if not any(directory.glob("*.safetensors")):
        raise _problem(
            source,
            "has no safetensors files",
            "choose a repository that has, or download it whole and run `sluice convert`",
        )
    return directory


_LOCAL = "give the path of a local directory, or download it where there is a network"
_NO_NETWORK = "without a network give a local directory; with one try again (gated models need HF_TOKEN)"


def _hint(path: Path) -> str:
    """What may have been meant by a path that does not exist."""
    parent = path.parent
    names = [entry.name for entry in parent.iterdir()] if parent.is_dir() else []
    close = nearest(path.name, names)
    meant = f"did you mean {parent / close}? Otherwise " if close else ""
    return f"{meant}give a model directory, a model-config.yaml or a hub id (ORG/NAME)"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _problem(source: str, wrong: str, remedy: str) -> ConfigError:
    return ConfigError([Problem("command line", source, wrong, remedy=remedy)])
