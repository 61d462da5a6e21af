"""Muon in float32: momentum, made orthogonal, for the matrices inside the layers.

torch.optim.Muon multiplies in bfloat16, which takes 60 times as long on a CPU without instructions for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_MOMENTUM = 0.95
_A, _B, _C = 3.4445, -4.7750, 2.0315  # Keller Jordan's: steepest at zero, so that five rounds do


class Muon(torch.optim.Optimizer):
    """The learning rate is scaled to the size of AdamW's updates (Liu et al., "Muon is Scalable for LLM
    Training")."""

    def __init__(self, params: Iterable[Tensor], weight_decay: float) -> None:
        super().__init__(params, {"lr": 0.0, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                if not state:
                    state["momentum"] = torch.zeros_like(param)
                momentum = state["momentum"]
                momentum.lerp_(param.grad, 1 - _MOMENTUM)
                update = _orthogonal(param.grad.lerp(momentum, _MOMENTUM))
                param.mul_(1 - group["lr"] * group["weight_decay"])
                param.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(param.shape)))


def _orthogonal(matrix: Tensor) -> Tensor:
    """Its singular values brought near 1, by five rounds of a Newton-Schulz iteration."""
    x = matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x.mT if matrix.shape[0] > matrix.shape[1] else x
