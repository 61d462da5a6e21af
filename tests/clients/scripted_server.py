"""The real gateway before a model that says what it is told to, one text an answer, with a template of
Hermes's kind: python -m tests.clients.scripted_server TEXT...

Prints its address, and serves until standard input ends.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.gateway.chat_models import make_chat_model, scripted, serving_chat


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        model_dir = make_chat_model(Path(directory), "hermes")
        with serving_chat(model_dir, scripted(model_dir, *sys.argv[1:])) as url:
            print(url, flush=True)
            sys.stdin.read()


if __name__ == "__main__":
    main()
