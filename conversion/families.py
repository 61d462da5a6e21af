"""What Meta's params.json leaves out, for the models that Meta has released.

Sources: the models' cards, Meta's llama and llama-models repositories, the config.json of their Hugging
Face counterparts. Whatever is not here is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

LLAMA3_VOCAB = 128256


@dataclass(frozen=True, slots=True)
class Scaling:
    """llama3 rope scaling: the low frequencies are divided by `factor`."""

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    max_positions: int = 131072


_SCALED: dict[tuple[int, int, int], Scaling] = {
    (4096, 32, 32): Scaling(8.0),  # Llama 3.1 8B
    (8192, 80, 64): Scaling(8.0),  # Llama 3.1 and 3.3 70B
    (16384, 126, 128): Scaling(8.0),  # Llama 3.1 405B
    (2048, 16, 32): Scaling(32.0),  # Llama 3.2 1B
    (3072, 28, 24): Scaling(32.0),  # Llama 3.2 3B
}


def scaling_of(dim: int, n_layers: int, n_heads: int, vocab: int) -> Scaling | None:
    """The scaling of a released model, by its shape; None: not among them."""
    return _SCALED.get((dim, n_layers, n_heads)) if vocab == LLAMA3_VOCAB else None


def max_positions(vocab: int, theta: float, norm_eps: float) -> tuple[int, str] | None:
    """Positions of an unscaled model and which one it is taken for, or None."""
    if vocab == LLAMA3_VOCAB and theta == 500000.0:
        return 8192, "Llama 3"
    if theta == 1000000.0:
        return 16384, "Code Llama"
    if theta == 10000.0 and norm_eps == 1e-6:
        return 2048, "Llama 1, by its norm_eps"
    if theta == 10000.0 and norm_eps == 1e-5:
        return 4096, "Llama 2, by its norm_eps"
    return None


def token_ids(vocab: int) -> tuple[dict[str, int], str]:
    """bos_token_id and eos_token_id of the tokenizers that Meta ships, and whose that is."""
    if vocab == LLAMA3_VOCAB:
        return {"bos_token_id": 128000, "eos_token_id": 128001}, "Llama 3"
    return {"bos_token_id": 1, "eos_token_id": 2}, "Llama 1 and 2"
