"""One contract, every engine: real torchrun groups, compared with Hugging Face `generate` in float32.

Runs over every continuous engine of the registry by name, and over one that is added by an entry point
(tests/engines/two_stage.py). The pool of K/V blocks is small enough that mixed batches preempt.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from engines import registry
from engines.config import ModelConfig
from engines.runtime import sampler
from engines.runtime.plan import RowSampling, RowUse
from engines.wire import SamplingParams
from tests.engines.harness import Group, StartFailed, running
from tests.engines.layouts import LAYOUTS, TWO_STAGE, Layout
from tests.engines.reference import hf_greedy, prompts, request_of
from tests.models import GQA, make_llama

NUM_BLOCKS, BLOCK_SIZE, MAX_BATCHED = 48, 16, 64


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("models") / "gqa", GQA, seed=3)


@pytest.fixture(scope="module")
def reference(model: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


def config_for(layout: Layout, model: Path) -> ModelConfig:
    return layout.config(model, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, max_batched=MAX_BATCHED)


@pytest.fixture(scope="module", params=[*LAYOUTS, TWO_STAGE], ids=str)
def group(request: pytest.FixtureRequest, model: Path) -> Iterator[Group]:
    with running(config_for(request.param, model)) as group:
        yield group


def test_every_registered_engine_is_here() -> None:
    static = {"deepspeed_inject"}  # CUDA only; tests/engines/test_deepspeed_inject.py
    assert set(registry.names()) <= {layout.engine for layout in LAYOUTS} | static


def test_greedy_alone_is_hugging_faces(group: Group, reference: torch.nn.Module) -> None:
    for i, prompt in enumerate(prompts(4, GQA.vocab, seed=1)):
        assert group.run([request_of(f"a{i}", prompt)])[0].token_ids == hf_greedy(reference, prompt)


def test_a_mixed_batch_changes_nothing(group: Group, reference: torch.nn.Module) -> None:
    before = group.stats()
    batch = prompts(32, GQA.vocab, seed=2)
    ended = group.run([request_of(f"m{i}", prompt, 48) for i, prompt in enumerate(batch)])
    assert [e.token_ids for e in ended] == [hf_greedy(reference, prompt, 48) for prompt in batch]
    after = group.stats()
    assert after.num_preemptions > before.num_preemptions, "the pool was meant to be too small"


def test_a_prefix_that_is_read_changes_nothing(group: Group, reference: torch.nn.Module) -> None:
    prompt = max(prompts(8, GQA.vocab, seed=3), key=len)
    first, second = (group.run([request_of(f"p{i}", prompt)])[0] for i in range(2))
    assert first.token_ids == second.token_ids == hf_greedy(reference, prompt)
    assert second.num_cached_tokens == (len(prompt) - 1) // BLOCK_SIZE * BLOCK_SIZE


def test_siblings_share_a_prompt(group: Group, reference: torch.nn.Module) -> None:
    (prompt,) = prompts(1, GQA.vocab, seed=4)
    ended = group.run([request_of(f"s{i}", prompt, choice=i, group="s") for i in range(3)])
    assert [e.token_ids for e in ended] == [hf_greedy(reference, prompt)] * 3


@torch.inference_mode()
def test_seeded_sampling_depends_on_the_request_only(group: Group, reference: torch.nn.Module) -> None:
    params = SamplingParams(
        temperature=0.9, top_p=0.8, top_k=40, presence_penalty=0.4, repetition_penalty=1.1, seed=77
    )
    (prompt,) = prompts(1, GQA.vocab, seed=5)
    expected = list(prompt)
    for position in range(len(prompt), len(prompt) + 12):
        logits = reference(torch.tensor([expected])).logits[0, -1:].float().clone()
        row = RowSampling(
            params, position, 1, len(prompt), token_ids=torch.tensor(expected, dtype=torch.int32).numpy()
        )
        expected.append(int(sampler.sample(logits, [row], [RowUse.SAMPLE]).token_ids[0]))
    others = [request_of(f"o{i}", p) for i, p in enumerate(prompts(6, GQA.vocab, seed=6))]
    ended = group.run([request_of("seeded", prompt, 12, sampling=params, choice=1), *others])
    assert ended[0].token_ids == expected[len(prompt) :]


@torch.inference_mode()
def test_prompt_logprobs_need_several_rows_of_a_sequence(group: Group, reference: torch.nn.Module) -> None:
    prompt = (
        prompts(1, GQA.vocab, seed=7)[0] + prompts(1, GQA.vocab, seed=8)[0] + prompts(1, GQA.vocab, seed=9)[0]
    )
    assert len(prompt) > MAX_BATCHED, "it shall take several chunks"
    (ended,) = group.run([request_of("p", prompt, 1, prompt_logprobs=2)])
    expected = reference(torch.tensor([prompt])).logits[0].log_softmax(-1)
    assert ended.prompt_logprobs is not None
    assert ended.prompt_logprobs[0] is None
    values = [value.logprob for value in ended.prompt_logprobs[1:] if value is not None]
    wanted = [expected[i, token].item() for i, token in enumerate(prompt[1:])]
    assert values == pytest.approx(wanted, abs=1e-4)


def test_an_aborted_sequence_gives_its_blocks_back(group: Group, reference: torch.nn.Module) -> None:
    prompt, other = prompts(2, GQA.vocab, seed=10)
    kept = group.start(request_of("kept", other))
    group.abort_after(request_of("gone", prompt, 600), num_tokens=3)
    assert kept.result(60).token_ids == hf_greedy(reference, other)
    stats = group.idle_stats()
    assert stats.num_running == stats.num_blocks_used == 0
    assert stats.num_blocks_free + stats.num_blocks_cached == NUM_BLOCKS


def test_what_the_bounds_forbid_is_refused_alone(group: Group, reference: torch.nn.Module) -> None:
    bad = SamplingParams(temperature=0.0, logit_bias={GQA.vocab + 1000: 1.0})
    prompt, other = prompts(2, GQA.vocab, seed=11)
    ended = group.run([request_of("bad", prompt, sampling=bad), request_of("good", other)])
    assert ended[0].error is not None
    assert ended[0].error.code == "invalid_request"
    assert ended[1].token_ids == hf_greedy(reference, other)


def test_what_could_never_fit_is_refused(group: Group) -> None:
    (ended,) = group.run([request_of("long", [5] * (NUM_BLOCKS * BLOCK_SIZE + 1))])
    assert ended.error is not None
    assert ended.error.code == "too_long"


def test_a_resumed_sequence_goes_on_with_the_same_tokens(group: Group, reference: torch.nn.Module) -> None:
    (prompt,) = prompts(1, GQA.vocab, seed=12)
    expected = hf_greedy(reference, prompt)
    (ended,) = group.run([request_of("r", prompt, resume_token_ids=expected[:7])])
    assert ended.token_ids == expected[7:]


def test_the_kv_spec_is_honest(group: Group) -> None:
    assert group.info.num_blocks == NUM_BLOCKS
    assert group.info.vocab_size == GQA.vocab


@pytest.mark.parametrize("layout", [LAYOUTS[1], LAYOUTS[3]], ids=str)
def test_a_damaged_shard_is_refused_by_name(layout: Layout, model: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(model, tmp_path / "damaged"))
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(StartFailed, match=r"model\.safetensors.*tensor.*truncated") as failure:
        running(config_for(layout, damaged)).__enter__()
    assert failure.value.is_permanent
