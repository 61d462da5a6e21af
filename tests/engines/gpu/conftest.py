"""Without a CUDA device Triton's interpreter runs the kernels, on the CPU. It has to be asked for before
Triton is imported, and knows no arithmetic in bfloat16."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
