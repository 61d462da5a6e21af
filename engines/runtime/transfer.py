"""Between the host and a device that queues its work, without waiting for that work."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def to_device(
    values: np.ndarray | Sequence[int] | Sequence[float], device: torch.device, dtype: torch.dtype
) -> Tensor:
    """A copy of `values` there. On CUDA it is queued, from memory that stays until it has been read."""
    tensor = torch.tensor(values, dtype=dtype)
    return tensor if device.type == "cpu" else _pinned(tensor, device).to(device, non_blocking=True)


def staged(array: np.ndarray, device: torch.device) -> Tensor:
    """`array` on the host, from where a copy to `device` need not be waited for."""
    return _pinned(torch.from_numpy(array), device)


def _pinned(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.pin_memory() if device.type == "cuda" else tensor


class Arriving:
    """A tensor on its way to the host."""

    def __init__(self, tensor: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._host = tensor
        if tensor.device.type == "cuda":
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def get(self) -> np.ndarray:
        """It. Waits until it has come."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        return self._host.numpy()
