"""The bounds of a request, in one table for both sides: the gateway refuses by it what a client sends, the
engine again what a gateway sends, so that a frontend that forgets a check endangers nobody.

The values are OpenAI's where OpenAI has one; the rest are ours, wide enough for every client we know.
Bounds of what never reaches the engine are in gateway/protocol/bounds.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Range(NamedTuple):
    """Both ends are allowed; NaN is not."""

    min: float
    max: float

    def holds(self, value: float) -> bool:
        return self.min <= value <= self.max


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
TOP_LOGPROBS = Range(0, 20)
DIMENSIONS = Range(1, 1 << 20)  # of an embedding; the model's own size is the bound that counts
TOKEN_ID = Range(0, 2**31 - 1)  # the model's own vocabulary is the bound that counts

MAX_STOP_TOKEN_IDS = 64
MAX_LOGIT_BIASES = 1_024

# As the engine gets them: resolved (a seed is drawn, "off" is 0), and n as the number of each choice.
SAMPLING = {
    "temperature": TEMPERATURE,
    "top_p": TOP_P,
    "top_k": Range(0, TOP_K.max),
    "min_p": MIN_P,
    "presence_penalty": PRESENCE_PENALTY,
    "frequency_penalty": FREQUENCY_PENALTY,
    "repetition_penalty": REPETITION_PENALTY,
    "seed": Range(0, 2**64 - 1),
    "logprobs": TOP_LOGPROBS,
}
"""Fields of SamplingParams that are numbers, or None for what is not asked."""

GENERATE = {
    "max_tokens": Range(0, MAX_TOKENS.max),  # 0: only the prompt's log-probabilities
    "min_tokens": MIN_TOKENS,
    "choice": Range(0, N.max - 1),
    "prompt_logprobs": TOP_LOGPROBS,
}
"""Fields of Generate that are."""

POOLING = {"dimensions": Range(0, DIMENSIONS.max)}  # 0: all
"""Fields of Pooling that are."""

MAX_GRAMMAR_CHARS = 2 << 20
GRAMMAR_LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 200_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 20_000,
    "max_lexer_states": 100_000,
    "max_grammar_size": 500_000,
}
"""llguidance's own, for one grammar: some tens of milliseconds to compile it and for one step, and of MB."""

MAX_LABEL_CHARS = 256
"""Of an id or a group, and bytes of a salt: what the gateway makes is far shorter."""
