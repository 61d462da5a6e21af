"""A test engine that asks for what the native one does not: two stages, and so two plans in flight.

It is added as any engine from outside the tree is, by an entry point, and proves that the seams carry
it: hidden states travel between the stages in `forward`, rank 0 samples on the last one.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from engines.base import Batch, KVSpec, ReportProgress, UnsupportedModel
from engines.config import ModelConfig
from engines.models.checkpoint import Checkpoint
from engines.models.config import LlamaConfig
from engines.models.llama import Llama, WeightLoader
from engines.runtime.mesh import Mesh


class TwoStageEngine:
    """A Llama in fp32, cut in the middle. Every rank loads all of it: a test of seams, not of memory."""

    batching: ClassVar[Literal["continuous", "static"]] = "continuous"
    plans_in_flight = 2

    def __init__(self, config: ModelConfig, mesh: Mesh, report: ReportProgress) -> None:
        if mesh.pp_size != 2:
            raise UnsupportedModel(
                f"this engine has two stages, the mesh {mesh.pp_size}: set parallelLevel: 2"
            )
        self._mesh = mesh
        self._config = LlamaConfig.load(config.model_path)
        loader = WeightLoader(Checkpoint(config.model_path), self._config, mesh, torch.float32, report)
        self._model = Llama(loader, self._config, mesh, self._config.max_positions)
        middle = self._config.num_layers // 2
        self._layers = self._model.layers[:middle] if mesh.is_first_stage else self._model.layers[middle:]
        for index, layer in enumerate(self._layers):
            layer.attention.layer = index  # of this stage's own K/V

    @property
    def kv_spec(self) -> KVSpec:
        devices = (self._mesh.device,) * len(self._layers)
        return KVSpec(self._config.num_kv_heads, self._config.head_dim, torch.float32, devices)

    @property
    def vocab_size(self) -> int:
        return self._config.vocab_size

    @property
    def max_model_len(self) -> int:
        return self._config.max_positions

    def forward(self, batch: Batch) -> Tensor | None:
        if self._mesh.is_first_stage:
            hidden = torch.nn.functional.embedding(batch.input_ids, self._model.embedding)
        else:
            hidden = torch.empty(batch.num_tokens, self._config.hidden_size)
            dist.recv(hidden, self._mesh.previous_rank)
        cos, sin = self._model.rotary.rows(batch.positions)
        for layer in self._layers:
            layer(hidden, self._model.rotary, cos, sin)
        if self._mesh.is_last_stage:
            return self._model.norm(hidden)
        dist.send(hidden, self._mesh.next_rank)
        return None

    def logits(self, hidden: Tensor) -> Tensor | None:
        return self._model.logits(hidden)
