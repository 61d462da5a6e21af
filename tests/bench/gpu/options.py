"""What bench_gpu was told, as its sections read it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from tests.models import LLAMA3_8B, TINY, Shape

SHAPES = {"llama-3-8b": LLAMA3_8B, "tiny": TINY}


@dataclass(frozen=True, slots=True)
class Options:
    """Lengths are in tokens. `prompt_len` and `output_len` are of each of the `num_requests` requests that
    the engine, its peers and the server get; `prefill` is one prompt alone."""

    work: Path
    shape_name: str
    device_type: str
    batches: tuple[int, ...]
    context: int
    steps: int
    prefill: int
    num_requests: int
    prompt_len: int
    output_len: int

    @property
    def shape(self) -> Shape:
        return SHAPES[self.shape_name]

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", 0) if self.is_cuda else torch.device(self.device_type)

    @property
    def is_cuda(self) -> bool:
        return self.device_type == "cuda"

    @property
    def block_size(self) -> int:
        """Of the K/V, as `sluice serve` has it on that device."""
        return 256 if self.is_cuda else 16

    @property
    def num_output_tokens(self) -> int:
        """Of all requests together."""
        return self.num_requests * self.output_len
