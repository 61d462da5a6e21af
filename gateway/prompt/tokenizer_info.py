"""What a model directory says of its tokenizer, for clients that tokenize themselves."""

from __future__ import annotations

import json
from pathlib import Path

from gateway.prompt.model_files import BadModelFile, file_in
from gateway.prompt.template import ChatTemplate

_LOCAL = ("name_or_path", "vocab_file", "merges_file", "tokenizer_file", "special_tokens_map_file")
"""Where somebody had the files."""


def load_tokenizer_info(model_dir: Path, template: ChatTemplate | None) -> dict[str, object]:
    """tokenizer_config.json, special tokens as plain strings, with the template that is used.

    Raises BadModelFile, OSError.
    """
    path = file_in(model_dir, "tokenizer_config.json")
    try:
        config = {} if path is None else json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadModelFile(f"{path}: is not a JSON object") from error
    info = {name: _plain(value) for name, value in config.items() if name not in _LOCAL}
    return info | {"chat_template": None if template is None else template.source}


def _plain(value: object) -> object:
    """A token that is written as an object, or a dict of such, as its text."""
    if not isinstance(value, dict):
        return value
    content = value.get("content")
    return content if isinstance(content, str) else {key: _plain(inner) for key, inner in value.items()}
