"""The real gateway before a group that says what it is told to: python -m tests.page.scripted_server FILE

Prints its address, and serves until standard input ends.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import msgspec

from tests.gateway.serving import listening, make_app, make_group, make_model_dir


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        model_dir = make_model_dir(Path(directory))
        group = make_group(model_dir, Path(sys.argv[1]).read_text(), tokens_per_delta=3)
        assert group.info is not None
        group.info = msgspec.structs.replace(group.info, max_model_len=1 << 16)
        with listening(make_app(model_dir, group)) as url:
            print(url, flush=True)
            sys.stdin.read()


if __name__ == "__main__":
    main()
