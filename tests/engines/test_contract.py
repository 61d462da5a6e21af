"""One contract, every engine: real torchrun groups, compared with Hugging Face `generate` in float32.

Runs over every engine of the registry by name, and over one that is added by an entry point
(tests/engines/two_stage.py); `pipeline` has a Hugging Face model as well. The pool of K/V blocks is small
enough that mixed batches preempt.

Kernel injection is here as the engine over a fake of the kernels (tests/engines/fake_injected.py). It is
static and its K/V its own, so what is about pages, the tests over PAGED, is not for it: preemption, cached
prefixes, blocks and their specification. tests/engines/test_deepspeed_inject.py has what is its own.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from llguidance import LLMatcher, LLTokenizer
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from engines import registry
from engines.base import BadCheckpoint
from engines.config import ModelConfig
from engines.runtime import sampler
from engines.runtime.mesh import Mesh
from engines.runtime.plan import RowSampling, RowUse
from engines.wire import PoolingMethod, SamplingParams, Stats
from tests.engines.harness import Group, StartFailed, running
from tests.engines.injected import NAMES, seed_of
from tests.engines.layouts import FAKE_INJECT, LAYOUTS, TWO_STAGE, Layout
from tests.engines.models.hf_models import BASE, make_hf
from tests.engines.reference import hf_greedy, hf_pooled, pooled_of, prompts, request_of, vector_of
from tests.engines.two_stage import TwoStageEngine
from tests.models import GQA, MHA, make_llama, write_byte_tokenizer

NUM_BLOCKS, BLOCK_SIZE, MAX_BATCHED = 48, 16, 64
EOS = 1


@dataclass(frozen=True)
class Case:
    """A layout, and the model that it serves."""

    layout: Layout
    kind: str = "llama"

    def __str__(self) -> str:
        return str(self.layout) if self.kind == "llama" else f"{self.layout}-{self.kind}"

    @property
    def vocab(self) -> int:
        return BASE["vocab_size"] if self.kind == "qwen3" else GQA.vocab

    @property
    def num_mixed(self) -> int:
        """Tokens of each sequence of the mixed batch; few where steps are dear: static batches (one for
        each length), four ranks of a Hugging Face model."""
        return 8 if self.layout.is_static else 24 if self.kind == "qwen3" else 48

    def make_model(self, directory: Path) -> Path:
        if self.kind == "qwen3":
            return make_hf(directory, self.kind, num_hidden_layers=3, max_position_embeddings=2048)
        return make_llama(directory, replace(MHA, vocab=GQA.vocab) if self.layout.is_static else GQA, seed=3)


PAGED = [*map(Case, (*LAYOUTS, TWO_STAGE)), Case(Layout("pipeline", tp=2, pp=2), "qwen3")]
paged = pytest.mark.parametrize("case", PAGED, indirect=True, ids=str, scope="module")


@pytest.fixture(scope="module", params=[*PAGED, Case(FAKE_INJECT)], ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(scope="module")
def model(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = case.make_model(tmp_path_factory.mktemp("models") / "model")
    write_byte_tokenizer(directory, min(case.vocab, 258))
    return directory


@pytest.fixture(scope="module")
def reference(model: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


def config_for(layout: Layout, model: Path) -> ModelConfig:
    return layout.config(model, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, max_batched=MAX_BATCHED)


@pytest.fixture(scope="module")
def group(case: Case, model: Path) -> Iterator[Group]:
    with running(config_for(case.layout, model), injecting=True) as group:
        yield group


def test_every_registered_engine_is_here() -> None:
    assert set(registry.names()) <= {layout.engine for layout in LAYOUTS} | {"deepspeed_inject"}


def test_greedy_alone_is_hugging_faces(case: Case, group: Group, reference: torch.nn.Module) -> None:
    for i, prompt in enumerate(prompts(4, case.vocab, seed=1)):
        assert group.run([request_of(f"a{i}", prompt)])[0].token_ids == hf_greedy(reference, prompt)


def test_a_mixed_batch_changes_nothing(case: Case, group: Group, reference: torch.nn.Module) -> None:
    batch = prompts(32, case.vocab, seed=2)
    count = case.num_mixed
    ended = group.run([request_of(f"m{i}", prompt, count) for i, prompt in enumerate(batch)])
    assert [e.token_ids for e in ended] == [hf_greedy(reference, prompt, count) for prompt in batch]
    if not case.layout.is_static:
        assert group.stats().num_preemptions > 0, "the pool was meant to be too small"


@paged
def test_a_prefix_that_is_read_changes_nothing(case: Case, group: Group, reference: torch.nn.Module) -> None:
    prompt = max(prompts(8, case.vocab, seed=3), key=len)
    first, second = (group.run([request_of(f"p{i}", prompt)])[0] for i in range(2))
    assert first.token_ids == second.token_ids == hf_greedy(reference, prompt)
    assert second.num_cached_tokens == (len(prompt) - 1) // BLOCK_SIZE * BLOCK_SIZE


def test_siblings_share_a_prompt(case: Case, group: Group, reference: torch.nn.Module) -> None:
    (prompt,) = prompts(1, case.vocab, seed=4)
    ended = group.run([request_of(f"s{i}", prompt, choice=i, group="s") for i in range(3)])
    assert [e.token_ids for e in ended] == [hf_greedy(reference, prompt)] * 3


@torch.inference_mode()
def test_seeded_sampling_depends_on_the_request_only(
    case: Case, group: Group, reference: torch.nn.Module
) -> None:
    params = SamplingParams(
        temperature=0.9, top_p=0.8, top_k=40, presence_penalty=0.4, repetition_penalty=1.1, seed=77
    )
    (prompt,) = prompts(1, case.vocab, seed=5)
    expected = list(prompt)
    for position in range(len(prompt), len(prompt) + 12):
        logits = reference(torch.tensor([expected])).logits[0, -1:].float().clone()
        row = RowSampling(params, 1, len(prompt), token_ids=torch.tensor(expected, dtype=torch.int32).numpy())
        drawn = sampler.sample(logits, [row], [RowUse.SAMPLE], lambda at=position: np.array([at])).result()
        expected.append(int(drawn.token_ids[0]))
    others = [request_of(f"o{i}", p) for i, p in enumerate(prompts(6, case.vocab, seed=6))]
    ended = group.run([request_of("seeded", prompt, 12, sampling=params, choice=1), *others])
    assert ended[0].token_ids == expected[len(prompt) :]


@torch.inference_mode()
def test_prompt_logprobs_need_several_rows_of_a_sequence(
    case: Case, group: Group, reference: torch.nn.Module
) -> None:
    prompt = (
        prompts(1, case.vocab, seed=7)[0]
        + prompts(1, case.vocab, seed=8)[0]
        + prompts(1, case.vocab, seed=9)[0]
    )
    assert len(prompt) > MAX_BATCHED, "it shall take several chunks"
    (ended,) = group.run([request_of("p", prompt, 1, prompt_logprobs=2)])
    expected = reference(torch.tensor([prompt])).logits[0].log_softmax(-1)
    assert ended.prompt_logprobs is not None
    assert ended.prompt_logprobs[0] is None
    values = [value.logprob for value in ended.prompt_logprobs[1:] if value is not None]
    wanted = [expected[i, token].item() for i, token in enumerate(prompt[1:])]
    assert values == pytest.approx(wanted, abs=1e-4)


def test_prompts_are_pooled_beside_others_that_generate(
    case: Case, group: Group, reference: torch.nn.Module
) -> None:
    """Each in both ways; the longest takes several chunks."""
    batch = prompts(6, case.vocab, seed=14)
    batch.append([id for prompt in batch for id in prompt])
    assert len(batch[-1]) > 2 * MAX_BATCHED
    methods: list[PoolingMethod] = ["mean", "last"]
    wanted = [(prompt, method) for prompt in batch for method in methods]
    pooled = [pooled_of(f"e{i}", prompt, method) for i, (prompt, method) in enumerate(wanted)]
    generating = [request_of(f"eg{i}", prompt) for i, prompt in enumerate(batch[:3])]
    ended = group.run([*pooled, *generating])
    for one, (prompt, method) in zip(ended, wanted, strict=False):
        assert (one.error, one.finish_reason, one.token_ids) == (None, "stop", [])
        expected = hf_pooled(reference, prompt, method)
        assert group.info.hidden_size == len(expected)
        assert (vector_of(one.embedding) - expected).abs().max().item() < 1e-5
    assert [one.token_ids for one in ended[len(pooled) :]] == [hf_greedy(reference, p) for p in batch[:3]]
    assert_conserved(case, group.idle_stats())


@torch.inference_mode()
def test_a_grammar_binds_its_sequence_only(
    case: Case, group: Group, model: Path, reference: torch.nn.Module
) -> None:
    """Greedily: at each place the likeliest token of those that go on. Others in the batch are as ever."""
    code = LLMatcher.grammar_from_regex("[0-9]{3,6}(-[a-z]{2,4}){2}!")
    prompt, *others = prompts(5, case.vocab, seed=12)
    tokenizer_file = model / "tokenizer.json"
    tokenizer = LLTokenizer(tokenizer_file.read_text(), n_vocab=case.vocab, eos_token=EOS)
    matcher, ids = LLMatcher(tokenizer, code), list(prompt)
    while ids[-1] != EOS:
        bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
        logits = reference(torch.tensor([ids])).logits[0, -1]
        ids.append(int(logits.masked_fill(torch.from_numpy(bits[: case.vocab] == 0), -torch.inf).argmax()))
        assert matcher.consume_token(ids[-1])
    bound = [request_of(f"c{i}", prompt, 40, grammar=code, choice=i, group="c") for i in range(2)]
    broken = request_of("broken", prompt, grammar="start: /[/")
    *ended, failed = group.run(
        [*bound, *(request_of(f"g{i}", each) for i, each in enumerate(others)), broken]
    )
    assert [one.token_ids for one in ended[:2]] == [ids[len(prompt) :]] * 2
    assert [one.finish_reason for one in ended[:2]] == ["stop"] * 2
    assert [one.token_ids for one in ended[2:]] == [hf_greedy(reference, each) for each in others]
    assert failed.error is not None
    assert failed.error.code == "invalid_request"
    assert re.fullmatch(
        "[0-9]{3,6}(-[a-z]{2,4}){2}!", Tokenizer.from_file(str(tokenizer_file)).decode(ids[len(prompt) :])
    )


def test_an_aborted_sequence_gives_its_blocks_back(
    case: Case, group: Group, reference: torch.nn.Module
) -> None:
    prompt, other = prompts(2, case.vocab, seed=10)
    kept = group.start(request_of("kept", other))
    group.abort_after(request_of("gone", prompt, 600), num_tokens=3)
    assert kept.result(60).token_ids == hf_greedy(reference, other)
    stats = group.idle_stats()
    assert stats.num_running == 0
    assert_conserved(case, stats)


def assert_conserved(case: Case, stats: Stats) -> None:
    """No block is held, and none is lost."""
    assert stats.num_blocks_used == stats.num_account_faults == 0
    assert stats.num_blocks_free + stats.num_blocks_cached == (0 if case.layout.is_static else NUM_BLOCKS)


def test_what_the_bounds_forbid_is_refused_alone(
    case: Case, group: Group, reference: torch.nn.Module
) -> None:
    bad = SamplingParams(temperature=0.0, logit_bias={case.vocab + 1000: 1.0})
    prompt, other = prompts(2, case.vocab, seed=11)
    ended = group.run([request_of("bad", prompt, sampling=bad), request_of("good", other)])
    assert ended[0].error is not None
    assert ended[0].error.code == "invalid_request"
    assert ended[1].token_ids == hf_greedy(reference, other)


def test_an_exception_in_one_request_hurts_only_that_request(
    case: Case, group: Group, reference: torch.nn.Module
) -> None:
    """One at each site of a request's own work, each beside one with the same prompt."""
    prompt = max(prompts(8, case.vocab, seed=13), key=len)
    expected = hf_greedy(reference, prompt)
    sites = [site for site in NAMES if not (site == "prefix hash" and case.layout.is_static)]
    victims = [
        request_of(
            f"victim {site}",
            prompt,
            sampling=SamplingParams(seed=seed_of(site, 0, serial), presence_penalty=0.5, logprobs=2),
            prompt_logprobs=1 if site == "prompt logprobs" else None,
        )
        for serial, site in enumerate(sites)
    ]
    pids = group.info.pids
    mates = [request_of(f"mate {site}", prompt) for site in sites]
    ended = group.run([one for pair in zip(victims, mates, strict=True) for one in pair])
    errors = {site: one.error and one.error.code for site, one in zip(sites, ended[::2], strict=True)}
    assert errors == dict.fromkeys(sites, "internal")
    assert [one.token_ids for one in ended[1::2]] == [expected] * len(sites)
    assert group.run([request_of("after", prompt)])[0].token_ids == expected
    assert group.info.pids == pids, "the group is the same"
    assert_conserved(case, group.idle_stats())


def test_what_could_never_fit_is_refused(group: Group) -> None:
    (ended,) = group.run([request_of("long", [5] * (group.info.max_model_len + 1))])
    assert ended.error is not None
    assert ended.error.code == "too_long"


def test_a_resumed_sequence_goes_on_with_the_same_tokens(
    case: Case, group: Group, reference: torch.nn.Module
) -> None:
    (prompt,) = prompts(1, case.vocab, seed=12)
    expected = hf_greedy(reference, prompt)
    (ended,) = group.run([request_of("r", prompt, resume_token_ids=expected[:7])])
    assert ended.token_ids == expected[7:]


@paged
def test_the_kv_spec_is_honest(case: Case, group: Group) -> None:
    assert group.info.num_blocks == NUM_BLOCKS
    assert group.info.vocab_size == case.vocab


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of several files, which every engine serves."""
    return make_llama(
        tmp_path_factory.mktemp("models") / "whole", replace(MHA, layers=3), seed=3, shard_bytes=100_000
    )


def truncate(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:-1000])


def double(shard: Path) -> None:
    """As that of a model of twice the size."""
    save_file({name: torch.cat([tensor, tensor]) for name, tensor in load_file(shard).items()}, shard)


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (truncate, "tensor .*truncated"),
    "of another model": (double, "tensor .*shape"),
    "missing": (Path.unlink, "no such file"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("layout", [*LAYOUTS, TWO_STAGE, Layout("deepspeed_inject", is_static=True)], ids=str)
def test_a_wrong_shard_is_refused_by_name(layout: Layout, damage: str, whole: Path, tmp_path: Path) -> None:
    """Before weights are read; so in this process, as a rank would."""
    damaged = Path(shutil.copytree(whole, tmp_path / "damaged"))
    shard = sorted(damaged.glob("*.safetensors"))[1]
    strike, expected = DAMAGES[damage]
    strike(shard)
    device = "cuda" if layout.engine == "deepspeed_inject" else "cpu"
    config = config_for(layout, damaged).model_copy(update={"device": device})
    engine = TwoStageEngine if layout == TWO_STAGE else registry.load(layout.engine)
    mesh = Mesh(0, layout.tp, layout.pp, torch.device("cpu"))
    with pytest.raises(BadCheckpoint, match=f"{re.escape(shard.name)}.*{expected}"):
        engine(config, mesh, lambda *_: None)


@pytest.mark.parametrize("layout", [LAYOUTS[1], LAYOUTS[3]], ids=str)
def test_a_group_with_a_wrong_shard_is_not_tried_again(layout: Layout, whole: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(whole, tmp_path / "damaged"))
    shard = sorted(damaged.glob("*.safetensors"))[1]
    truncate(shard)
    with pytest.raises(StartFailed, match=f"{re.escape(shard.name)}.*tensor.*truncated") as failure:
        running(config_for(layout, damaged)).__enter__()
    assert failure.value.is_permanent
