"""The pipeline engine: a model cut into stages of consecutive layers (pp), each over its own ranks (pptp).

Ranks form a mesh of stages x tensor-parallel ranks, tp inner; each reads its own slices of its own
layers, and hands hidden states [T, H] to the same tensor-parallel rank one stage on. Llamas are the native
ones; other Hugging Face models are cut by their own plans: into stages by the pp plan (hf_stage), over the
ranks of a stage by the tp plan (hf_tp), where hf_tp knows it to be exact.

Plans are the micro-batches: as many are in flight as there are stages, each of other sequences, and every
rank executes them in the leader's order. A rank sends without waiting, while there is room for what is on its
way, and goes on with the next plan.

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
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from engines.base import Batch, KVSpec, ReportProgress, UnsupportedModel
from engines.models.config import LlamaConfig, is_llama
from engines.models.llama import HowLinear, Llama, WeightLoader
from engines.models.names import indivisible, kv_heads_of, kv_share
from engines.models.rank_weights import open_weights
from engines.models.stages import BadSplit, Sizes, sizes_of, split_layers
from engines.runtime.mesh import Mesh

if TYPE_CHECKING:
    from engines.config import ModelConfig

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class StageModel(Protocol):
    """What a stage holds of a model. `embed` is for the first one, `norm` and `logits` for the last."""

    @property
    def embed(self) -> Callable[[Tensor], Tensor]:
        """[T] ids to [T, H]."""

    def run_layers(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """[T, H], [T] to [T, H]."""

    @property
    def norm(self) -> Callable[[Tensor], Tensor]:
        """[T, H] to [T, H]."""

    @property
    def logits(self) -> Callable[[Tensor], Tensor | None]:
        """[L, H] to [L, V] float32 on tensor-parallel rank 0, None on the others."""


@dataclass(frozen=True, slots=True)
class _Stage:
    """A stage's model, loaded, and what the engine tells of it."""

    model: StageModel
    kv_spec: KVSpec
    hidden_size: int
    vocab_size: int
    max_model_len: int


class PipelineEngine:
    """Implements engines.base.Engine."""

    batching: ClassVar[Literal["continuous", "static"]] = "continuous"

    def __init__(self, config: ModelConfig, mesh: Mesh, report: ReportProgress) -> None:
        load = _load_llama if is_llama(config.model_path) else _load_hugging_face
        self._mesh = mesh
        with torch.inference_mode():
            self._stage = load(config, mesh, report)
        self._model = self._stage.model
        self._plans_in_flight = config.pipeline_chunks or mesh.pp_size
        self._link = StageLink(
            mesh, self._stage.hidden_size, self._stage.kv_spec.dtype, self._plans_in_flight
        )

    @property
    def kv_spec(self) -> KVSpec:
        return self._stage.kv_spec

    @property
    def vocab_size(self) -> int:
        return self._stage.vocab_size

    @property
    def max_model_len(self) -> int:
        return self._stage.max_model_len

    @property
    def plans_in_flight(self) -> int:
        """One micro-batch for each stage, unless pippy.chunks says how many."""
        return self._plans_in_flight

    def forward(self, batch: Batch) -> Tensor | None:
        """[T, H] on the ranks of the last stage."""
        is_first = self._mesh.is_first_stage
        hidden = self._model.embed(batch.input_ids) if is_first else self._link.receive(batch.num_tokens)
        hidden = self._model.run_layers(hidden, batch.positions)
        if self._mesh.is_last_stage:
            return self._model.norm(hidden)
        self._link.send(hidden)
        return None

    def logits(self, hidden: Tensor) -> Tensor | None:
        return self._model.logits(hidden)


def _load_llama(config: ModelConfig, mesh: Mesh, report: ReportProgress) -> _Stage:
    """Each rank its slices of the layers of its stage."""
    model = LlamaConfig.load(config.model_path)
    reason = indivisible(model, mesh.tp_size)
    if reason is not None:
        raise UnsupportedModel(
            f"the stages cannot be split over {mesh.tp_size} ranks each: {reason} cannot be shared evenly; "
            "choose a tensorParallel that divides them"
        )
    layers = _layers_of(sizes_of(model), config, mesh)
    checkpoint = open_weights(config.model_path, model, mesh, layers, reshard=config.reshard)
    dtype = checkpoint.dtype if config.dtype == "auto" else _DTYPES[config.dtype]
    loader = WeightLoader(checkpoint, model, mesh, dtype, report, HowLinear.of(config))
    max_positions = min(config.max_model_len or model.max_positions, model.max_positions)
    return _Stage(
        Llama(loader, model, mesh, max_positions, layers),
        KVSpec(
            num_kv_heads=len(kv_heads_of(model, mesh.tp_rank, mesh.tp_size)),
            head_dim=model.head_dim,
            dtype=dtype,
            devices=(mesh.device,) * len(layers),
        ),
        model.hidden_size,
        model.vocab_size,
        model.max_positions,
    )


def _load_hugging_face(config: ModelConfig, mesh: Mesh, report: ReportProgress) -> _Stage:
    """Each rank its parts of the layers of its stage, as transformers' plans divide them."""
    from engines.models import hf, hf_inspect, hf_stage, hf_tp  # transformers takes seconds to import

    if config.deterministic:
        raise UnsupportedModel(
            "deterministic: true is for Llamas, whose layers have kernels of ours; remove it for this model"
        )
    found = hf_inspect.inspect_model(config.model_path, config.max_model_len)
    hf_tp.check_heads(found, mesh.tp_size)
    checkpoint = hf.open_checkpoint(found)
    shape, dtype = found.shape, hf.dtype_of(found, checkpoint, config.dtype)
    num_kv_heads = len(kv_share(shape.num_kv_heads, mesh.tp_rank, mesh.tp_size))
    layers = _layers_of(hf_stage.sizes_of(found, checkpoint), config, mesh)
    return _Stage(
        hf_stage.HFStage(found, checkpoint, dtype, layers, mesh, report),
        KVSpec(num_kv_heads, shape.head_dim, dtype, (mesh.device,) * len(layers)),
        found.config.hidden_size,
        shape.vocab_size,
        shape.max_positions,
    )


def _layers_of(sizes: Sizes, config: ModelConfig, mesh: Mesh) -> range:
    """The layers of this rank's stage. Raises UnsupportedModel, before any weight is read."""
    try:
        return split_layers(sizes, mesh.pp_size, config.stage_split)[mesh.stage]
    except BadSplit as bad:
        raise UnsupportedModel(str(bad)) from None


class StageLink:
    """Hidden states from the stage before and to the one after, [T, H] in the model's dtype.

    Sending does not wait for the receiver, who may still compute what came before, unless more is on its way
    than a SharedPipe holds. With gloo and NCCL a buffer is kept until it has gone, and before more than
    `max_in_flight` are kept, the oldest is waited for: the leader has collected that plan by then, so it has.
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
            if self._mesh.from_previous is not None:
                self._mesh.from_previous.receive(hidden)
            else:
                dist.recv(hidden, self._mesh.previous_rank)
        return hidden.to(self._mesh.device)

    def send(self, hidden: Tensor) -> None:
        """Raises RuntimeError, or TimeoutError, when the receiver is gone."""
        assert hidden.dtype == self._dtype, "the receiver counts on it"
        assert hidden.shape[1] == self._hidden_size, "the receiver counts on it"
        if self._mesh.to_next is not None:
            with self._mesh.clock.waiting():
                self._mesh.to_next.send(hidden.contiguous())
            return
        hidden = hidden.to(self._wire_device)
        work = dist.isend(hidden, self._mesh.next_rank)
        assert work is not None, "this rank is in the group"
        self._sent.append((work, hidden))
        if len(self._sent) > self._max_in_flight:
            oldest, _ = self._sent.popleft()
            with self._mesh.clock.waiting():
                oldest.wait()
