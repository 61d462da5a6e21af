"""The forward context: what attention needs in a forward pass, carried beside the model, not through it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from engines.base import Batch
    from engines.runtime.attention import AttentionStep
    from engines.runtime.kv_cache import LayerCache


@dataclass(frozen=True, slots=True, eq=False)
class ForwardContext:
    """The batch of the step and this rank's K/V, one entry a layer that it holds."""

    batch: Batch
    caches: Sequence[LayerCache]
    attention: dict[torch.device, AttentionStep] = field(default_factory=dict)  # filled by the first layer


_current: ForwardContext | None = None


class forward_context:  # noqa: N801  a class, for a generator takes three times as long
    """Make a context current within. Refuses nesting: a step runs one forward pass at a time."""

    __slots__ = ("_context",)

    def __init__(self, context: ForwardContext) -> None:
        self._context = context

    def __enter__(self) -> None:
        global _current
        assert _current is None, "forward contexts do not nest"
        _current = self._context

    def __exit__(self, *_: object) -> None:
        global _current
        _current = None


def current() -> ForwardContext:
    """The current context. Only inside `forward_context`."""
    assert _current is not None, "attention was called outside a forward context"
    return _current
