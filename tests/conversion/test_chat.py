"""What Meta releases, weights and tokenizer.model, is converted and then answers a chat."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer

from conversion.plan import Target
from conversion.source import Choices
from tests.conversion.helpers import convert
from tests.conversion.test_tokenizer import learnt_words, sentencepiece_file, tiktoken_file
from tests.e2e.server import serving
from tests.models import Shape, make_llama

CHOICES = Choices(max_positions=256)
LLAMA3 = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nthe way<|eot_id|>"
LLAMA3 += "<|start_header_id|>assistant<|end_header_id|>\n\n"
LLAMA2 = "<s>[INST] the way [/INST]"


def released(root: Path, vocab: int) -> Path:
    """Two shards and params.json, nothing else."""
    shape = Shape(
        hidden=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn=48, vocab=vocab, max_positions=256
    )
    meta = root.with_name(f"{root.name}-meta")
    convert(
        make_llama(root.with_name(f"{root.name}-hf"), shape, 1, torch.bfloat16),
        meta,
        Target("meta", shards=2),
    )
    for name in ("manifest.json", "generation_config.json"):
        (meta / name).unlink()
    return meta


def test_converted_models_answer_chats(tmp_path: Path) -> None:
    three = released(tmp_path / "llama3", 512)
    tiktoken_file(three / "tokenizer.model", {bytes([byte]): byte for byte in range(256)})
    convert(three, tmp_path / "llama3", Target("sluice"), choices=CHOICES)
    words = learnt_words(30)
    two = released(tmp_path / "llama2", 259 + len(words))
    sentencepiece_file(two / "tokenizer.model", words)
    convert(two, tmp_path / "llama2", Target("hf"), choices=CHOICES)
    with serving(str(tmp_path / "llama3"), str(tmp_path / "llama2")) as server:
        for model, prompt in (("llama3", LLAMA3), ("llama2", LLAMA2)):
            body = {"model": model, "max_tokens": 4, "messages": [{"role": "user", "content": "the way"}]}
            answer = server.client.post("/v1/chat/completions", json=body)
            assert answer.status_code == 200, answer.text
            ids = Tokenizer.from_file(str(tmp_path / model / "tokenizer.json")).encode(
                prompt, add_special_tokens=False
            )
            usage = answer.json()["usage"]
            assert usage["prompt_tokens"] == len(ids)
            assert 1 <= usage["completion_tokens"] <= 4
        assert server.stop() == 0, server.output()
