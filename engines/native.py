"""The native engine: a tensor-parallel Llama, read straight from safetensors, attention over paged K/V."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from engines.base import Batch, KVSpec, ReportProgress, UnsupportedModel
from engines.models.config import LlamaConfig
from engines.models.llama import HowLinear, Llama, WeightLoader
from engines.models.names import indivisible, kv_heads_of
from engines.models.rank_weights import open_weights
from engines.runtime.mesh import Mesh

if TYPE_CHECKING:
    from engines.config import ModelConfig

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class NativeEngine:
    """Implements engines.base.Engine."""

    batching: ClassVar[Literal["continuous", "static"]] = "continuous"

    def __init__(self, config: ModelConfig, mesh: Mesh, report: ReportProgress) -> None:
        self._config = LlamaConfig.load(config.model_path)
        _check_split(self._config, mesh)
        layers = range(self._config.num_layers)
        checkpoint = open_weights(config.model_path, self._config, mesh, layers, reshard=config.reshard)
        self._mesh = mesh
        self._dtype = checkpoint.dtype if config.dtype == "auto" else _DTYPES[config.dtype]
        loader = WeightLoader(checkpoint, self._config, mesh, self._dtype, report, HowLinear.of(config))
        max_positions = min(config.max_model_len or self._config.max_positions, self._config.max_positions)
        with torch.inference_mode():
            self._model = Llama(loader, self._config, mesh, max_positions)

    @property
    def kv_spec(self) -> KVSpec:
        return KVSpec(
            num_kv_heads=len(kv_heads_of(self._config, self._mesh.tp_rank, self._mesh.tp_size)),
            head_dim=self._config.head_dim,
            dtype=self._dtype,
            devices=(self._mesh.device,) * self._config.num_layers,
        )

    @property
    def vocab_size(self) -> int:
        return self._config.vocab_size

    @property
    def max_model_len(self) -> int:
        return self._config.max_positions

    @property
    def plans_in_flight(self) -> int:
        return 1

    @property
    def runs_ahead(self) -> bool:
        """Whether a step is only queued, so that the next can be before this one's tokens are known."""
        return self._mesh.device.type == "cuda"

    @property
    def is_recordable(self) -> bool:
        """Whether a decoding step does the same with the same tensors, and waits for nothing."""
        is_queued = self._mesh.tp_group is None or dist.get_backend(self._mesh.tp_group) == "nccl"
        return self.runs_ahead and is_queued and self._model.fused_layers is not None

    def forward(self, batch: Batch) -> Tensor:
        """[T, H] on every rank: one stage is the first and the last."""
        return self._model.forward(batch.input_ids, batch.positions)

    def logits(self, hidden: Tensor) -> Tensor | None:
        return self._model.logits(hidden)


def _check_split(config: LlamaConfig, mesh: Mesh) -> None:
    if mesh.pp_size != 1:
        raise UnsupportedModel("engine native splits by tensor parallelism only: use engine: pipeline for pp")
    reason = indivisible(config, mesh.tp_size)
    if reason is not None:
        raise UnsupportedModel(
            f"the model cannot be split over {mesh.tp_size} ranks: {reason} cannot be shared evenly; "
            "choose a parallelLevel (nproc-per-node) that divides them"
        )
