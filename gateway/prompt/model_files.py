"""The text files of a model directory, which is somebody else's: a name in it may lead anywhere."""

from __future__ import annotations

from pathlib import Path

MAX_BYTES = 256 << 20  # the largest tokenizers have some tens of MB


class BadModelFile(ValueError):  # noqa: N818
    """A file of the model that is not read. Names it."""


def file_in(model_dir: Path, name: str) -> Path | None:
    """The directory's file of that name, if there is one.

    A link may lead to the blobs of the hub's cache that the directory belongs to, and nowhere else.
    Raises BadModelFile: for other links, what is no regular file, and what is too large.
    """
    path, root = model_dir / name, model_dir.resolve()
    if not path.is_symlink() and not path.exists():
        return None
    if path.resolve().parent not in (root, root.parent.parent / "blobs"):
        raise BadModelFile(f"{path}: is a link that leads out of the model directory: copy the file there")
    if not path.is_file():
        raise BadModelFile(f"{path}: is not a regular file")
    if path.stat().st_size > MAX_BYTES:
        raise BadModelFile(f"{path}: is larger than {MAX_BYTES >> 20} MiB")
    return path
