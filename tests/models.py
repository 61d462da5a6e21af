"""Random Llama checkpoints for tests and benchmarks, written as Hugging Face directories."""

from __future__ import annotations

import json
import math
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from engines.models.config import LlamaConfig
from engines.models.names import TensorSpec, expected_tensors


@dataclass(frozen=True)
class Shape:
    """What make_llama needs to know. `extra` is merged into config.json."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    tied: bool = False
    max_positions: int = 2048
    extra: dict[str, Any] = field(default_factory=dict)

    def config_json(self, dtype: torch.dtype) -> dict[str, Any]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.ffn,
            "vocab_size": self.vocab,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": self.max_positions,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "torch_dtype": str(dtype).removeprefix("torch."),
            **self.extra,
        }


TINY = Shape(hidden=256, layers=4, heads=8, kv_heads=4, head_dim=32, ffn=512, vocab=8192, tied=True)
SMALL = Shape(hidden=768, layers=12, heads=12, kv_heads=4, head_dim=64, ffn=2048, vocab=32000)
B1 = Shape(hidden=2048, layers=16, heads=32, kv_heads=8, head_dim=64, ffn=8192, vocab=32000, tied=True)
SHAPES = {"tiny": TINY, "small": SMALL, "b1": B1}
"""Those that benchmarks take by name."""

LLAMA3_8B = Shape(
    hidden=4096,
    layers=32,
    heads=32,
    kv_heads=8,
    head_dim=128,
    ffn=14336,
    vocab=128256,
    max_positions=8192,
    extra={"rope_theta": 500000.0},
)

LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MHA = Shape(hidden=64, layers=2, heads=4, kv_heads=4, head_dim=16, ffn=96, vocab=256)
GQA = Shape(hidden=96, layers=3, heads=8, kv_heads=2, head_dim=16, ffn=160, vocab=301)
ODD = Shape(
    hidden=72,
    layers=2,
    heads=4,
    kv_heads=1,
    head_dim=26,
    ffn=100,
    vocab=257,
    tied=True,
    extra={"rope_scaling": LLAMA3_SCALING, "attention_bias": True, "mlp_bias": True, "rope_theta": 500000.0},
)


def make_llama(
    directory: Path,
    shape: Shape,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    *,
    tokenizer: bool = False,
    shard_bytes: int | None = None,
    device: str | torch.device = "cpu",
) -> Path:
    """Write a seeded random model into `directory`, and return it.

    Weights have the scale 1/sqrt(inputs), so that every part of the model tells on its output, and
    embeddings a small one, so that a tied model does not just repeat its input. `tokenizer` also trains
    a tokenizer (seconds) and zeroes the head's rows of tokens that are not printable on their own.
    `shard_bytes`: write several files and an index, as the hub does for large models. `device`: where
    the weights are drawn, each kind of device others; a GPU takes seconds for what a CPU takes minutes for.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config = shape.config_json(dtype)
    _write_json(directory / "config.json", config)
    _write_json(directory / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 1})
    specs = expected_tensors(LlamaConfig.parse(config, "config.json"))
    generator = torch.Generator(device).manual_seed(seed)
    tensors = {spec.name: _random(spec, generator).to(dtype).cpu() for spec in specs.values()}
    if tokenizer:
        unprintable = write_tokenizer(directory, shape.vocab)
        tensors["model.embed_tokens.weight" if shape.tied else "lm_head.weight"][unprintable] = 0
    _save(directory, tensors, shard_bytes)
    return directory


def _random(spec: TensorSpec, generator: torch.Generator) -> torch.Tensor:
    values: torch.Tensor = torch.randn(spec.shape, generator=generator, device=generator.device)
    if spec.name.endswith("norm.weight"):
        return 1 + 0.1 * values
    if spec.name.endswith(("bias", "embed_tokens.weight")):
        return 0.02 * values
    return values / math.sqrt(spec.shape[1])


def _save(directory: Path, tensors: dict[str, torch.Tensor], shard_bytes: int | None) -> None:
    if shard_bytes is None:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return
    shards = list(_shards(tensors, shard_bytes))
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file({name: tensors[name] for name in names}, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(names, file))
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(directory / "model.safetensors.index.json", index)


def _shards(tensors: dict[str, torch.Tensor], shard_bytes: int) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        if names and size + tensor.nbytes > shard_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += tensor.nbytes
    yield names


def write_tokenizer(directory: Path, vocab: int) -> list[int]:
    """Train a byte-level BPE tokenizer on the standard library's sources and write it.

    Padded with unused added tokens up to `vocab`. Returns the ids that are not printable text on
    their own: special and padding tokens, parts of a character.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|begin_of_text|>", "<|end_of_text|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train(sorted(str(p) for p in Path(sysconfig.get_path("stdlib")).glob("*.py")), trainer)
    num_trained = tokenizer.get_vocab_size()
    tokenizer.add_tokens([f"<|unused_{i}|>" for i in range(vocab - num_trained)])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": special[0],
        "eos_token": special[1],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        "chat_template": CHAT_TEMPLATE,
    }
    _write_json(directory / "tokenizer_config.json", settings)
    texts = [tokenizer.decode([i], skip_special_tokens=True) for i in range(num_trained)]
    partial = [i for i, text in enumerate(texts) if not text or "\ufffd" in text]
    return partial + list(range(num_trained, vocab))


def write_byte_tokenizer(directory: Path, vocab: int = 258) -> None:
    """One token a byte, from 2 on, without training; 0 begins a text and 1 ends it. A smaller vocabulary has
    letters, digits and signs, but not every byte."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[: vocab - 2]
    special = ["<|begin_of_text|>", "<|end_of_text|>"]
    vocab = {token: id for id, token in enumerate(special + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.save(str(directory / "tokenizer.json"))


CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")
