"""The pipeline engine: a Llama cut into stages of consecutive layers (pp), each over its own ranks (pptp).

Ranks form a mesh of stages x tensor-parallel ranks, tp inner; each reads its own slices of its own
layers, and hands hidden states [T, H] to the same tensor-parallel rank one stage on.

Plans are the micro-batches: as many are in flight as there are stages, each of other sequences, and every
rank executes them in the leader's order. A rank sends without waiting and goes on with the next plan.

Why the p2p is not that of torch.distributed.pipelining (PiPPy's successor), as tried with torch 2.13:

- A PipelineStage's shapes are fixed when it is built or by its first chunk. Here T differs from step to step;
  a chunk of 17 rows sent to a stage built for 16 ends the receiving process (gloo's own check). A stage for
  each T, or padding to buckets, would compute rows that nobody asked for to save one `send`.
- Without static shapes stages agree on them by pickled objects over the wire, which nothing here reads.
- A schedule's `step` takes all micro-batches at once and returns when all are done: the pipe drains at each
  step. Decoding makes the next micro-batch from the tokens of the last, while the others are under way.
- A stage keeps each chunk's inputs and outputs for a backward pass until all are done, and knows of no K/V.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from engines.base import Batch, KVSpec, ReportProgress, UnsupportedModel
from engines.models.config import LlamaConfig
from engines.models.llama import Llama, WeightLoader
from engines.models.names import indivisible, kv_heads_of
from engines.models.rank_weights import open_weights
from engines.models.stages import BadSplit, sizes_of, split_layers
from engines.runtime.mesh import Mesh

if TYPE_CHECKING:
    from engines.config import ModelConfig

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class PipelineEngine:
    """Implements engines.base.Engine."""

    batching: ClassVar[Literal["continuous", "static"]] = "continuous"

    def __init__(self, config: ModelConfig, mesh: Mesh, report: ReportProgress) -> None:
        self._config = LlamaConfig.load(config.model_path)
        self._layers = _layers_of(self._config, config, mesh)
        checkpoint = open_weights(config.model_path, self._config, mesh, self._layers, reshard=config.reshard)
        self._mesh = mesh
        self._dtype = checkpoint.dtype if config.dtype == "auto" else _DTYPES[config.dtype]
        self._plans_in_flight = config.pipeline_chunks or mesh.pp_size
        self._link = StageLink(mesh, self._config.hidden_size, self._dtype, self._plans_in_flight)
        loader = WeightLoader(checkpoint, self._config, mesh, self._dtype, report)
        max_positions = min(config.max_model_len or self._config.max_positions, self._config.max_positions)
        with torch.inference_mode():
            self._model = Llama(loader, self._config, mesh, max_positions, self._layers)

    @property
    def kv_spec(self) -> KVSpec:
        return KVSpec(
            num_kv_heads=len(kv_heads_of(self._config, self._mesh.tp_rank, self._mesh.tp_size)),
            head_dim=self._config.head_dim,
            dtype=self._dtype,
            devices=(self._mesh.device,) * len(self._layers),
        )

    @property
    def vocab_size(self) -> int:
        return self._config.vocab_size

    @property
    def max_model_len(self) -> int:
        return self._config.max_positions

    @property
    def plans_in_flight(self) -> int:
        """One micro-batch for each stage, unless pippy.chunks says how many."""
        return self._plans_in_flight

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Tensor | None:
        """[T, H] on the ranks of the last stage."""
        is_first = self._mesh.is_first_stage
        hidden = self._model.embed(batch.input_ids) if is_first else self._link.receive(batch.num_tokens)
        hidden = self._model.run_layers(hidden, batch.positions)
        if self._mesh.is_last_stage:
            return self._model.norm(hidden)
        self._link.send(hidden)
        return None

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor | None:
        return self._model.logits(hidden)


class StageLink:
    """Hidden states from the stage before and to the one after, [T, H] in the model's dtype.

    Sending does not wait for the receiver, who may still compute what came before. A buffer is kept until
    it has gone, and before more than `max_in_flight` are kept, the oldest is waited for: the leader has
    collected that plan by then, so it has.
    """

    def __init__(self, mesh: Mesh, hidden_size: int, dtype: torch.dtype, max_in_flight: int) -> None:
        self._mesh, self._hidden_size, self._dtype = mesh, hidden_size, dtype
        self._max_in_flight = max_in_flight
        self._sent: deque[tuple[dist.Work, Tensor]] = deque()
        is_gloo = mesh.world_size > 1 and dist.get_backend() == "gloo"
        self._wire_device = torch.device("cpu") if is_gloo else mesh.device  # gloo sends host memory only

    def receive(self, num_tokens: int) -> Tensor:
        """What the stage before made of the oldest plan not yet received."""
        hidden = torch.empty(num_tokens, self._hidden_size, dtype=self._dtype, device=self._wire_device)
        with self._mesh.clock.waiting():
            dist.recv(hidden, self._mesh.previous_rank)
        return hidden.to(self._mesh.device)

    def send(self, hidden: Tensor) -> None:
        """Raises RuntimeError when the receiver is gone."""
        hidden = hidden.to(self._wire_device)
        work = dist.isend(hidden, self._mesh.next_rank)
        assert work is not None, "this rank is in the group"
        self._sent.append((work, hidden))
        if len(self._sent) > self._max_in_flight:
            oldest, _ = self._sent.popleft()
            with self._mesh.clock.waiting():
                oldest.wait()


def _layers_of(model: LlamaConfig, config: ModelConfig, mesh: Mesh) -> range:
    """The layers of this rank's stage. Raises UnsupportedModel, before any weight is read."""
    reason = indivisible(model, mesh.tp_size)
    if reason is not None:
        raise UnsupportedModel(
            f"the stages cannot be split over {mesh.tp_size} ranks each: {reason} cannot be shared evenly; "
            "choose a tensorParallel that divides them"
        )
    try:
        return split_layers(sizes_of(model), mesh.pp_size, config.stage_split)[mesh.stage]
    except BadSplit as bad:
        raise UnsupportedModel(str(bad)) from None
