"""Every numeric bound of the API. Those that the engine enforces too come from the table of both sides."""

from __future__ import annotations

from engines.bounds import (
    DIMENSIONS,
    FREQUENCY_PENALTY,
    LOGIT_BIAS,
    MAX_LOGIT_BIASES,
    MAX_STOP_TOKEN_IDS,
    MAX_TOKENS,
    MIN_P,
    MIN_TOKENS,
    PRESENCE_PENALTY,
    REPETITION_PENALTY,
    SEED,
    TEMPERATURE,
    TOKEN_ID,
    TOP_K,
    TOP_LOGPROBS,
    TOP_P,
    N,
    Range,
)

__all__ = [
    "DIMENSIONS",
    "FREQUENCY_PENALTY",
    "LOGIT_BIAS",
    "MAX_LOGIT_BIASES",
    "MAX_STOP_TOKEN_IDS",
    "MAX_TOKENS",
    "MIN_P",
    "MIN_TOKENS",
    "PRESENCE_PENALTY",
    "REPETITION_PENALTY",
    "SEED",
    "TEMPERATURE",
    "TOKEN_ID",
    "TOP_K",
    "TOP_LOGPROBS",
    "TOP_P",
    "N",
    "Range",
]

BEST_OF = N  # OpenAI's most is 20, below its own n
TRUNCATE_PROMPT_TOKENS = Range(-1, TOKEN_ID.max)  # -1: to what fits; 0 is refused
DEFAULT_COMPLETION_TOKENS = 16
MAX_STOP_STRINGS = 4
MAX_STOP_SEQUENCES = 64
"""Anthropic's name for them."""
MAX_STOP_CHARS = 1_000
MAX_MESSAGES = 4_096
MAX_CONTENT_PARTS = 1_024
MAX_SHAPE_CHARS = 262_144
"""Of a schema (as JSON), a regular expression, a grammar, a list of choices (as JSON)."""
MAX_SHAPE_CHOICES = 10_000
MAX_PROMPTS = 256
MAX_INPUTS = 2_048
"""Of a request for embeddings."""
MAX_SEQUENCES = 256
"""Prompts times what is drawn for each, of one request."""
MAX_ECHOED_CHARS = 16 << 20
MAX_PROMPT_LOGPROBS = 500_000
"""Of one answer: tokens of its prompts, times 1 + those shown at each place, times n."""
MAX_TOOLS = 128
MAX_LABEL_CHARS = 256
"""Of an id or a name in a conversation."""
MAX_TEMPLATE_VARIABLES = 32
