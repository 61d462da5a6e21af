"""On CUDA, where there is a device: `pytest -m gpu`. What tests/engines/gpu shows of single parts, those show
of groups; ranks that share one device talk over gloo, which shows that they agree, not how fast they are."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import pytest
import torch
from transformers import AutoModelForCausalLM

from conversion.plan import Target
from engines.config import DeepSpeedSection, ModelConfig
from engines.gpu import support
from engines.runtime.attention_paged import _Flash, _OneByOne, _Sequences
from engines.wire import SamplingParams
from tests.conversion.helpers import convert
from tests.engines.harness import Group, running
from tests.engines.reference import hf_greedy, hf_pooled, pooled_of, prompts, request_of, vector_of
from tests.models import GQA, MHA, Shape, make_llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]
NUM_TOKENS = 32
WIDE = replace(GQA, head_dim=64, hidden=256, ffn=512)
"""Sizes that fp8's products take."""


def config_for(model: Path, **settings: object) -> ModelConfig:
    size = int(settings.get("tp_size", 1)) * int(settings.get("pp_size", 1))  # type: ignore[call-overload]
    defaults = {
        "model_name": "gpu",
        "served_model_names": ("gpu",),
        "model_path": str(model),
        "dtype": "float32",
        "device": "cuda",
        "kv_block_size": 256,
        "gpu_memory_share": 0.3 / size,
        "startup_timeout": 120,
    }
    return ModelConfig(**(defaults | settings))


def greedy(group: Group, batch: list[list[int]]) -> list[list[int]]:
    ended = group.run([request_of(f"{i}", prompt, NUM_TOKENS) for i, prompt in enumerate(batch)])
    return [each.token_ids for each in ended]


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("shape", [MHA, GQA], ids=["mha", "gqa"])
def test_greedy_tokens_are_hugging_faces(shape: Shape, tp: int, tmp_path: Path) -> None:
    """With recorded steps, plans that run ahead and fused layers; embeddings as well."""
    model = make_llama(tmp_path / "model", shape, seed=5)
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    batch = prompts(16, shape.vocab, seed=6)
    with running(config_for(model, tp_size=tp)) as group:
        tokens = greedy(group, batch)
        pooled = group.run([pooled_of(f"e{i}", prompt, "mean") for i, prompt in enumerate(batch)])
    for one, prompt in zip(pooled, batch, strict=True):
        assert (vector_of(one.embedding) - hf_pooled(reference, prompt, "mean")).abs().max().item() < 1e-4
    assert tokens == [hf_greedy(reference, prompt, NUM_TOKENS) for prompt in batch]


ENGINES = {
    "pipeline": {"engine": "pipeline", "pp_size": 2, "parallel_type": "pp"},
    "accelerate": {"engine": "accelerate", "parallel_type": "custom"},
    "deepspeed_tp": {"engine": "deepspeed_tp"},
    "deepspeed_inject": {"engine": "deepspeed_inject", "batch_size": 8, "max_batch_delay": 0.02},
}


@pytest.mark.parametrize("name", ENGINES)
def test_other_engines_give_the_same_tokens(name: str, tmp_path: Path) -> None:
    package = name.split("_")[0]
    if package != "pipeline" and find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    model = make_llama(tmp_path / "model", MHA, seed=5)
    settings: dict[str, object] = {**ENGINES[name]}
    if name == "deepspeed_inject":
        (model / "ds.json").write_text('{"replace_with_kernel_inject": true}')
        settings["deepspeed"] = DeepSpeedSection(config=str(model / "ds.json"))
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    batch = prompts(8, MHA.vocab, seed=7)
    with running(config_for(model, **settings)) as group:
        assert greedy(group, batch) == [hf_greedy(reference, prompt, NUM_TOKENS) for prompt in batch]


def largest_lead(reference: torch.nn.Module, batch: list[list[int]], tokens: list[list[int]]) -> float:
    """By how much the reference preferred another token to one that was drawn, at most, given all that came
    before it."""
    lead = 0.0
    for prompt, drawn in zip(batch, tokens, strict=True):
        with torch.inference_mode():
            logits = reference(torch.tensor([prompt + drawn])).logits[0, len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(drawn).unsqueeze(1)).squeeze(1)
        lead = max(lead, float((logits.amax(-1) - chosen).max()))
    return lead


def logits_error(exact: torch.nn.Module, other: torch.nn.Module, ids: list[int]) -> float:
    """The largest, of Hugging Face's own models."""
    row = torch.tensor([ids])
    with torch.inference_mode():
        return float((exact(row).logits.float() - other(row).logits.float()).abs().max())


def assert_near(
    model: Path, other: Path, dtype: torch.dtype, batch: list[list[int]], tokens: list[list[int]]
) -> None:
    """Where `tokens` are not those that `model` in float32 would have drawn, it is that these hardly led: by
    a few times what the logits of Hugging Face's own `other` in `dtype` are off."""
    exact, rounded = (
        AutoModelForCausalLM.from_pretrained(path, dtype=kind).eval()
        for path, kind in ((model, torch.float32), (other, dtype))
    )
    error = max(
        logits_error(exact, rounded, prompt + drawn) for prompt, drawn in zip(batch, tokens, strict=True)
    )
    assert largest_lead(exact, batch, tokens) <= 4 * error


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_draws_what_nearly_leads(dtype: str, tmp_path: Path) -> None:
    model = make_llama(tmp_path / "model", GQA, seed=5)
    batch = prompts(12, GQA.vocab, seed=8)
    with running(config_for(model, dtype=dtype)) as group:
        tokens = greedy(group, batch)
    assert_near(model, model, getattr(torch, dtype), batch, tokens)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_quantised_weights_draw_what_nearly_leads(kind: Literal["int8", "fp8"], tmp_path: Path) -> None:
    """As the converter writes them, beside the same weights widened again."""
    model = make_llama(tmp_path / "model", WIDE, 5, torch.bfloat16)
    small, widened = tmp_path / "small", tmp_path / "widened"
    convert(model, small, Target("sluice", quantize=kind))
    convert(small, widened, Target("hf", dtype="BF16"))
    batch = prompts(12, WIDE.vocab, seed=9)
    with running(config_for(small, dtype="bfloat16")) as group:
        tokens = greedy(group, batch)
    assert_near(model, widened, torch.bfloat16, batch, tokens)


def test_paged_flash_attention_writes_all_sequences() -> None:
    """Few queries over contexts that it would cut into parts: some versions of torch leave all but the first
    sequence unwritten."""
    if not support.varlen_is_paged():
        pytest.skip("this torch's varlen_attn takes no block table")
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.bfloat16, device="cuda", generator=generator)

    keys, values, query = normal(8, 256, 8, 128), normal(8, 256, 8, 128), normal(10, 32, 128)
    ints = {"dtype": torch.int32, "device": "cuda"}
    sequences = _Sequences(
        rows=None,
        query_lens=[5, 5],
        query_start=torch.tensor([0, 5, 10], **ints),  # type: ignore[call-overload]
        context_lens=torch.tensor([600, 700], **ints),  # type: ignore[call-overload]
        tables=torch.tensor([[5, 0, 3], [1, 7, 2]], **ints),  # type: ignore[call-overload]
        contexts=[600, 700],
        max_context=700,
    )
    flash, exact = (kind(sequences).attend(query, keys, values, 0.1) for kind in (_Flash, _OneByOne))
    torch.testing.assert_close(flash, exact, rtol=2e-2, atol=2e-2)


def test_sampled_tokens_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    model = make_llama(tmp_path / "model", GQA, seed=5)
    batch = prompts(12, GQA.vocab, seed=10)
    drawn = SamplingParams(temperature=0.9, top_p=0.9, top_k=40, seed=3, logprobs=2)
    requests = [request_of(f"{i}", prompt, 16, sampling=drawn) for i, prompt in enumerate(batch)]
    with running(config_for(model)) as group:
        together = [each.token_ids for each in group.run(requests)]
        alone = [
            group.run([request_of(f"alone{i}", prompt, 16, sampling=drawn)])[0].token_ids
            for i, prompt in enumerate(batch)
        ]
    assert together == alone


def test_a_group_survives_a_device_without_memory(tmp_path: Path) -> None:
    """Another process takes what the group had not: it refuses what does not fit, and serves again after."""
    shape = replace(GQA, vocab=32_000)
    model = make_llama(tmp_path / "model", shape, seed=5)
    prompt = prompts(1, GQA.vocab, seed=11)[0]
    with running(config_for(model, max_num_batched_tokens=8192)) as group:
        expected = greedy(group, [prompt])
        free, _ = torch.cuda.mem_get_info()
        hog = torch.empty(max(0, free - (64 << 20)), dtype=torch.uint8, device="cuda")
        long = [(prompt * 100)[:2_000]] * 8
        ended = group.run([request_of(f"l{i}", each, 4, prompt_logprobs=5) for i, each in enumerate(long)])
        assert all(each.error is None or "no memory" in each.error.message for each in ended)
        del hog
        torch.cuda.empty_cache()
        assert greedy(group, [prompt]) == expected
