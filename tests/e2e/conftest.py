"""One server a module: each start costs seconds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.server import Server, serving


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """`sluice serve` with the demo model, ready; in float32, where batch-mates change no token.

    It must end cleanly at SIGTERM."""
    with serving("--dtype", "float32", "--pooling", "mean") as server:
        yield server
        assert server.stop() == 0, server.output()
        assert server.run_dirs() == []
