"""What the engines' tests share."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session", autouse=True)
def _deepspeeds_all_reduce() -> None:
    """Compiled ahead: it takes a minute on a busy machine, more than a group gets to start in these tests."""
    from tests.engines.harness import compile_all_reduce

    compile_all_reduce()
