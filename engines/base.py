"""The plug-in contract: what a model on one rank must offer, and what it is given.

An engine is one class that implements `Engine`, and one line in engines/registry.py (or an entry
point in the group `sluice.engines`). Scheduling, batching, K/V memory, sampling and sockets are not
its business; tensors are not anybody else's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from engines.config import ModelConfig
    from engines.runtime.mesh import Mesh


class ReportProgress(Protocol):
    """Called with the fraction done, 0 to 1, of loading the weights, or of compiling what an engine needs
    before that: the time that takes is not counted as loading."""

    def __call__(self, fraction: float, phase: Literal["load", "compile"] = "load", /) -> None: ...


class UnsupportedModel(ValueError):  # noqa: N818  it names a model, not a failure of ours
    """This engine cannot serve this model exactly. The message says what, why, and the remedy."""


class BadCheckpoint(ValueError):  # noqa: N818
    """A weight file is missing, truncated, corrupt or of the wrong shape. Names file and tensor."""


COPY_AGAIN = "copy or download it again, and compare its size or sha256 with the original's"
"""What to do with a file that is damaged."""


@dataclass(frozen=True, slots=True)
class KVSpec:
    """The paged K/V that this rank needs: one entry of `devices` a layer that it holds (pp), and the
    K/V heads that it holds of each (tp)."""

    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    devices: tuple[torch.device, ...]

    @property
    def num_layers(self) -> int:
        return len(self.devices)

    def bytes_per_token(self) -> int:
        """Bytes of keys and values of one token over all layers of this rank."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """A StepPlan on this rank's device. Shapes as there; int64 where torch wants indices."""

    input_ids: Tensor  # [T] int64, LAST_SAMPLED already replaced
    positions: Tensor  # [T] int64
    slot_mapping: Tensor  # [T] int64
    query_start: Tensor  # [S + 1] int32
    context_lens: Tensor  # [S] int32
    block_tables: Tensor  # [S, W] int32
    logit_rows: Tensor  # [L] int64
    query_start_list: list[int]  # the same on the host, for planning without a sync
    context_lens_list: list[int]
    max_query_len: int
    max_context_len: int
    reads_all: bool = True  # hidden states of any token may be read; else those of `logit_rows` alone

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[0]

    @property
    def num_seqs(self) -> int:
        return len(self.context_lens_list)


@runtime_checkable
class Engine(Protocol):
    """The model on one rank.

    `__init__(config, mesh, report)` loads this rank's share of the weights, and tells `report` how far it
    is. It raises UnsupportedModel before it reads any weight, BadCheckpoint while reading.
    """

    batching: ClassVar[Literal["continuous", "static"]]

    def __init__(self, config: ModelConfig, mesh: Mesh, report: ReportProgress) -> None: ...

    @property
    def kv_spec(self) -> KVSpec | None:
        """The K/V that the runtime shall keep for it. None: the engine owns its K/V (static batching), and
        has its torch.dtype as `dtype`, which is otherwise that of the K/V."""

    @property
    def vocab_size(self) -> int:
        """How many ids the model knows, padding not counted."""

    @property
    def max_model_len(self) -> int:
        """Positions the model was made for."""

    @property
    def plans_in_flight(self) -> int:
        """How many plans of disjoint sequences keep it busy: 1, or the stages of a pipeline."""

    def forward(self, batch: Batch) -> Tensor | None:
        """Hidden states [T, H] after the last norm on the last stage, None on the others. Unless
        `batch.reads_all`, what the last layer does for tokens not in `logit_rows` may be left out.

        Called on every rank with the same batch inside `forward_context`, in torch's inference mode, as
        `logits` is; attention goes through `runtime.attention.paged_attention`, which writes and reads the
        K/V. Sends and receives between stages happen in here.
        """

    def logits(self, hidden: Tensor) -> Tensor | None:
        """[L, H] to [L, vocab_size] float32, whole on rank 0, None on other ranks.

        Called on all ranks of the last stage with the rows that `batch.logit_rows` picked."""
