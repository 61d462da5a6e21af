"""The random models that tests and benchmarks run on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from tests.models import MHA, Shape, make_llama

WORDS = Shape(hidden=32, layers=1, heads=2, kv_heads=2, head_dim=16, ffn=32, vocab=600)


def test_a_seed_is_one_model(tmp_path: Path) -> None:
    first, again, other = (make_llama(tmp_path / str(i), MHA, seed) for i, seed in enumerate((1, 1, 2)))
    weights = [load_file(directory / "model.safetensors") for directory in (first, again, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    name = "lm_head.weight"
    assert not torch.equal(weights[0][name], weights[2][name])


@pytest.mark.slow
def test_greedy_text_of_a_model_with_a_tokenizer_is_printable(tmp_path: Path) -> None:
    directory = make_llama(tmp_path, WORDS, tokenizer=True)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == WORDS.vocab
    source = "def main():\n    return 'é'\n"
    assert tokenizer.decode(tokenizer.encode(source).ids) == source
    head = load_file(directory / "model.safetensors")["lm_head.weight"]
    likely = [i for i in range(WORDS.vocab) if head[i].any()]
    assert len(likely) > 300
    assert all(tokenizer.decode([i]) and "\ufffd" not in tokenizer.decode([i]) for i in likely)
