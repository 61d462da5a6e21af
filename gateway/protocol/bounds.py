"""Every numeric bound of the API, in one table. The request models read them from here.

The values are OpenAI's where OpenAI has one; the rest are ours, wide enough for every client we know.
"""

from __future__ import annotations

from typing import NamedTuple


class Range(NamedTuple):
    """Both ends are allowed."""

    min: float
    max: float


TEMPERATURE = Range(0.0, 2.0)
TOP_P = Range(0.0, 1.0)
TOP_K = Range(-1, 1_000_000)  # -1 and 0 are off
MIN_P = Range(0.0, 1.0)
PRESENCE_PENALTY = Range(-2.0, 2.0)
FREQUENCY_PENALTY = Range(-2.0, 2.0)
REPETITION_PENALTY = Range(0.01, 10.0)
LOGIT_BIAS = Range(-100.0, 100.0)
SEED = Range(-(2**63), 2**63 - 1)
N = Range(1, 128)
MAX_TOKENS = Range(1, 10_000_000)  # the model's own length is the bound that counts
MIN_TOKENS = Range(0, 10_000_000)
TOP_LOGPROBS = Range(0, 20)  # chat
LOGPROBS = Range(0, 5)  # completions
TOKEN_ID = Range(0, 2**31 - 1)

DEFAULT_COMPLETION_TOKENS = 16
MAX_STOP_STRINGS = 4
MAX_STOP_CHARS = 1_000
MAX_STOP_TOKEN_IDS = 64
MAX_LOGIT_BIASES = 1_024
MAX_MESSAGES = 4_096
MAX_CONTENT_PARTS = 1_024
MAX_PROMPTS = 256
MAX_SEQUENCES = 256
"""Prompts times choices of one request."""
