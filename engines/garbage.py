"""Python's garbage collector in a process that serves: gateway or rank."""

from __future__ import annotations

import gc

_THRESHOLD = 50_000  # new containers, for Python's 700


def settle() -> None:
    """Call when everything is loaded and before anybody is served. The garbage collector leaves alone what is
    there: a look at all of it stops every stream, 74,000 objects of a gateway or 215,000 of a rank, for a
    tenth of a second. And it looks for more less often: what a token leaves behind is no cycle."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_THRESHOLD)
