"""The native engine as it is on a GPU: fused layers, paged K/V, plans that run ahead, recorded steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from engines.gpu import support
from engines.native import NativeEngine
from engines.runtime.decode_graphs import CudaRecorder
from engines.runtime.kv_cache import Layout
from engines.runtime.mesh import single
from engines.wire import Generate, SamplingParams
from tests.engines.driver import native
from tests.engines.reference import hf_greedy, hf_pooled, pooled_of, prompts, request_of, vector_of
from tests.engines.runtime.in_process import InProcess
from tests.models import Shape, make_llama

SHAPE = Shape(hidden=48, layers=2, heads=4, kv_heads=2, head_dim=12, ffn=72, vocab=101)
"""None of its sizes is a power of two; small, for the interpreter is slow."""
NUM_TOKENS = 7
SAMPLED = SamplingParams(temperature=0.8, top_p=0.9, seed=5, repetition_penalty=1.2)


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class FakeRecording:
    """Does the work again, on the same tensors and to the same output, where CUDA would replay a graph."""

    def __init__(self, work: Callable[[], Tensor | None]) -> None:
        self._work = work
        self.output = work()

    def replay(self) -> None:
        out = self._work()
        assert out is not None
        assert self.output is not None
        self.output.copy_(out)


class Counted:
    """Recordings of the device, or fakes of them; `num_replays` of all."""

    num_replays = 0

    def __init__(self, work: Callable[[], Tensor | None]) -> None:
        self._recording = CudaRecorder()(work) if DEVICE == "cuda" else FakeRecording(work)
        self.output = self._recording.output

    def replay(self) -> None:
        Counted.num_replays += 1
        self._recording.replay()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("fused") / "model", SHAPE, seed=3)


@pytest.fixture(scope="module")
def reference(model: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[NativeEngine]:
    """As on a GPU, if need be on a CPU, without the kernels for those."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(support, "has_kernels", lambda _: True)
        engine = native(model, single(DEVICE), dtype="float32", max_model_len=128)
        engine._model.kernel_layers = None
        assert engine._model.fused_layers is not None
        yield engine


def group_of(engine: NativeEngine, *, runs_ahead: bool, is_recorded: bool, **options: int) -> InProcess:
    group = InProcess(
        engine,
        block_size=8,
        max_num_seqs=3,
        plans_in_flight=2 if runs_ahead else 1,
        run_ahead=runs_ahead,
        record=Counted if is_recorded else None,
        device=DEVICE,
        **{"max_batched": 16, "num_blocks": 64, **options},
    )
    assert {cache.layout for cache in group.caches} == {Layout.PAGED}
    for cache in group.caches:  # whatever was there before
        cache.data.fill_(torch.nan)
    return group


WAYS = pytest.mark.parametrize(
    ("runs_ahead", "is_recorded"),
    [(False, False), (True, False), (True, True)],
    ids=["plain", "ahead", "recorded"],
)


@WAYS
def test_greedy_tokens_are_hugging_faces(
    engine: NativeEngine, reference: torch.nn.Module, runs_ahead: bool, is_recorded: bool
) -> None:
    """Prompts cut into chunks beside sequences that decode, prefixes found again, 1 to 3 sequences."""
    batch = [prompt[:24] for prompt in prompts(5, SHAPE.vocab, seed=6)]
    lengths = [NUM_TOKENS, 3, NUM_TOKENS, 5, NUM_TOKENS]
    before = Counted.num_replays
    group = group_of(engine, runs_ahead=runs_ahead, is_recorded=is_recorded)
    ended = group.run(
        [request_of(f"{i}", prompt, n) for i, (prompt, n) in enumerate(zip(batch, lengths, strict=True))]
    )
    expected = [hf_greedy(reference, prompt, n) for prompt, n in zip(batch, lengths, strict=True)]
    assert [each.token_ids for each in ended] == expected
    assert (Counted.num_replays > before) == is_recorded
    group.assert_empty()


@WAYS
def test_a_preempted_sequence_goes_on(
    engine: NativeEngine, reference: torch.nn.Module, runs_ahead: bool, is_recorded: bool
) -> None:
    batch = [prompt[:10] for prompt in prompts(3, SHAPE.vocab, seed=8)]
    group = group_of(engine, runs_ahead=runs_ahead, is_recorded=is_recorded, num_blocks=4)
    ended = group.run([request_of(f"{i}", prompt, NUM_TOKENS) for i, prompt in enumerate(batch)])
    assert [each.token_ids for each in ended] == [
        hf_greedy(reference, prompt, NUM_TOKENS) for prompt in batch
    ]
    assert group.scheduler.stats(0).num_preemptions > 0


def test_sampled_tokens_depend_on_none_of_it(engine: NativeEngine) -> None:
    def requests() -> list[Generate]:
        plain = SamplingParams(temperature=1.1, seed=9, logprobs=2)
        return [
            request_of(f"{i}", prompt[:12], 6, sampling=SAMPLED if i == 1 else plain)
            for i, prompt in enumerate(prompts(3, SHAPE.vocab, seed=7))
        ]

    ways = [(False, False), (True, False), (True, True)]
    drawn = [
        [each.token_ids for each in group_of(engine, runs_ahead=a, is_recorded=r).run(requests())]
        for a, r in ways
    ]
    assert drawn[0] == drawn[1] == drawn[2]


@WAYS
def test_hidden_states_are_had_of_single_tokens(
    engine: NativeEngine, reference: torch.nn.Module, runs_ahead: bool, is_recorded: bool
) -> None:
    """A prompt of one token, and one whose last chunk is one token, look like decoding; both are pooled."""
    batch = [[5], prompts(1, SHAPE.vocab, seed=4)[0][:2] * 8 + [7]]
    group = group_of(engine, runs_ahead=runs_ahead, is_recorded=is_recorded)
    ended = group.run([pooled_of(f"{i}", prompt, "mean") for i, prompt in enumerate(batch)])
    for each, prompt in zip(ended, batch, strict=True):
        expected = hf_pooled(reference, prompt, "mean")
        torch.testing.assert_close(vector_of(each.embedding), expected, rtol=0, atol=1e-5)
