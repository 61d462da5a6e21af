"""The native engine, which says of a CPU what holds for a GPU: that its steps are only queued."""

from __future__ import annotations

from engines.native import NativeEngine


class FakeAheadEngine(NativeEngine):
    """Its steps are done when they were started; what is tested is what the ranks know of each other's."""

    @property
    def runs_ahead(self) -> bool:
        return True
