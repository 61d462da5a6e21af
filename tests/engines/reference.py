"""What the engines' tests compare with: prompts, requests, and Hugging Face's greedy tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from engines.wire import Generate, Pooling, PoolingMethod, SamplingParams
from tests.models import GQA

GREEDY = SamplingParams(temperature=0.0)


def prompts(count: int, vocab: int, seed: int = 0) -> list[list[int]]:
    """Prompts of 3 to 100 tokens; every third starts like the one before it."""
    generator = torch.Generator().manual_seed(seed)
    made: list[list[int]] = []
    for i in range(count):
        length = int(torch.randint(3, 101, (1,), generator=generator))
        ids = torch.randint(2, vocab, (length,), generator=generator).tolist()
        made.append([*made[-1][:48], *ids][:100] if i % 3 == 2 else ids)
    return made


def random_prompt(length: int, seed: int, vocab: int = GQA.vocab) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, vocab, (length,), generator=generator).tolist()


def request_of(id: str, prompt: list[int], max_tokens: int = 16, **kwargs: object) -> Generate:
    options = {"sampling": GREEDY, "ignore_eos": True, **kwargs}
    return Generate(id=id, prompt_ids=prompt, max_tokens=max_tokens, **options)


def pooled_of(id: str, prompt: list[int], method: PoolingMethod, dimensions: int = 0) -> Generate:
    pooling = Pooling(method=method, dimensions=dimensions)
    return Generate(id=id, prompt_ids=prompt, max_tokens=0, pooling=pooling)


@torch.inference_mode()
def hf_pooled(
    reference: torch.nn.Module, prompt: list[int], method: PoolingMethod, dimensions: int | None = None
) -> Tensor:
    """[dimensions] of transformers' `last_hidden_state`, in float64 from there on, of length 1."""
    out = reference.base_model(torch.tensor([prompt]), use_cache=False)
    states = out.last_hidden_state[0].double()  # [T, H]
    vector = (states.mean(0) if method == "mean" else states[-1])[:dimensions]
    return vector / vector.norm()


def vector_of(embedding: bytes) -> Tensor:
    return torch.frombuffer(bytearray(embedding), dtype=torch.float32).double()


@torch.inference_mode()
def hf_greedy(reference: torch.nn.Module, prompt: list[int], max_tokens: int = 16) -> list[int]:
    ids = torch.tensor([prompt])
    out = reference.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        min_new_tokens=max_tokens,
        max_new_tokens=max_tokens,
        eos_token_id=[],
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()
