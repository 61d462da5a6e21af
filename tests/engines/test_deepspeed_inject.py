"""Kernel injection: what is refused and how, and static batches over a fake with the kernels' limits."""

from __future__ import annotations

import json
import re
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from engines import deepspeed_inject
from engines.base import UnsupportedModel
from engines.config import DeepSpeedSection, ModelConfig
from engines.deepspeed_inject import DeepSpeedInjectEngine, FillLayer
from engines.models.injection import check_support, settings_of
from engines.runtime.mesh import Mesh
from engines.runtime.plan import StepKind
from engines.runtime.runner import ModelRunner
from engines.runtime.static import StaticScheduler
from engines.wire import Generate, SamplingParams, TokenDelta
from tests.engines.fake_injected import FakeInjected, FakeInjectedModule, fake_inject
from tests.engines.harness import Ended, Group, running
from tests.engines.reference import hf_greedy, request_of
from tests.models import MHA, Shape, make_llama

MESH = Mesh(0, 1, 1, torch.device("cpu"))
BATCH = 4


def config_of(model: Path, content: dict[str, Any] | None = None, **changes: Any) -> ModelConfig:
    """`content`: of the DeepSpeed file, beside the choice of injection."""
    file = model / "ds-config.json"
    file.write_text(json.dumps({"replace_with_kernel_inject": True, **(content or {})}))
    settings = {
        "model_name": "m",
        "served_model_names": ("m",),
        "model_path": str(model),
        "engine": "deepspeed_inject",
        "device": "cuda",
        "dtype": "float32",
        "batch_size": BATCH,
        "deepspeed": DeepSpeedSection(config=str(file)),
    }
    return ModelConfig(**settings | changes)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_llama(tmp_path / "model", MHA, seed=3)


@pytest.fixture
def reference(model: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(2, MHA.vocab, (n,), generator=generator).tolist() for n in lengths]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "family": ({"model_type": "qwen2"}, r"model_type \('qwen2'\)"),
    "grouped heads": ({"num_key_value_heads": 2}, r"num_key_value_heads \(2\).*#4261"),
    "rope_scaling": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, r"rope_type \('linear'\)"),
    "rope_parameters": ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_type"),
    "head_dim": ({"head_dim": 32}, r"head_dim \(32\)"),
    "bias": ({"attention_bias": True}, "attention_bias .*biases"),
    "activation": ({"hidden_act": "gelu"}, r"hidden_act \('gelu'\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_kernels_get_wrong_is_refused_with_the_remedy(case: str, model: Path) -> None:
    changes, expected = REFUSED[case]
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    (model / "model.safetensors").unlink()  # refused before weights are looked for
    config = config_of(model)
    with pytest.raises(UnsupportedModel, match=rf"kernel injection.*: .*config\.json: .*{expected}.*AutoTP"):
        DeepSpeedInjectEngine(config, MESH, lambda *_: None)


def test_a_cpu_has_no_kernels(model: Path) -> None:
    config = config_of(model, device="cpu")
    with pytest.raises(UnsupportedModel, match=r"deviceType \('cpu'\).*replace_with_kernel_inject to false"):
        check_support(config, settings_of(config))


def test_sequences_longer_than_the_workspace_are_refused(model: Path) -> None:
    config = config_of(model, {"max_out_tokens": 64}, max_model_len=65)
    with pytest.raises(UnsupportedModel, match=r"maxModelLen \(65\) is more than max_out_tokens \(64\)"):
        check_support(config, settings_of(config))


@pytest.mark.parametrize(("tp", "key"), [(3, r"num_attention_heads \(4\)"), (4, r"intermediate_size \(98\)")])
def test_what_ranks_cannot_share_is_refused(model: Path, tp: int, key: str) -> None:
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"intermediate_size": 98}))
    config = config_of(model, tp_size=tp)
    with pytest.raises(UnsupportedModel, match=rf"{key} .*by {tp} ranks: set parallelLevel"):
        check_support(config, settings_of(config))


def test_cuda_graphs_are_refused(model: Path) -> None:
    config = config_of(model, {"enable_cuda_graph": True})
    with pytest.raises(UnsupportedModel, match=r"enable_cuda_graph .*set it to false"):
        check_support(config, settings_of(config))


def test_the_fallback_acts_when_the_user_set_it(model: Path) -> None:
    file = str(model / "ds-config.json")
    refused = config_of(model, device="cpu")
    allowed = refused.model_copy(update={"deepspeed": DeepSpeedSection(config=file, fallback="autotp")})
    assert DeepSpeedInjectEngine.instead(refused) is None
    assert DeepSpeedInjectEngine.instead(allowed) == "deepspeed_tp"
    assert DeepSpeedInjectEngine.instead(allowed.model_copy(update={"device": "cuda"})) is None


class Served:
    """Scheduler, runner and engine as the leader has them, without sockets; the clock stands still."""

    def __init__(self, model: Path, content: dict[str, Any] | None = None) -> None:
        config = config_of(model, content)
        self.engine = DeepSpeedInjectEngine(config, MESH, lambda *_: None)
        self.runner = ModelRunner(self.engine, MESH, (), BATCH)
        self.now = 0.0
        self.scheduler = StaticScheduler(
            BATCH, 0.1, self.engine.max_model_len, (), lambda: self.now, self.engine.min_prompt_len
        )
        self.tokens: dict[str, list[int]] = {}
        self.errors: dict[str, str] = {}

    def add(self, *requests: Generate) -> None:
        for request in requests:
            self._take(self.scheduler.add(request))

    def step(self) -> bool:
        """False when there was nothing to run."""
        plan = self.scheduler.schedule()
        if plan.kind != StepKind.RUN:
            return False
        self.runner.submit(plan)
        self._take(self.scheduler.update(*self.runner.collect()))
        return True

    def run(self) -> None:
        for _ in range(1000):
            if not self.scheduler.has_work:
                return
            if not self.step():
                self.now += 0.1
        raise AssertionError("it does not end")

    def _take(self, deltas: list[TokenDelta]) -> None:
        for delta in deltas:
            self.tokens.setdefault(delta.id, []).extend(delta.token_ids)
            if delta.error is not None:
                self.errors[delta.id] = delta.error.message


@pytest.fixture
def served(model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setattr(deepspeed_inject, "inject", fake_inject)
    yield Served(model)
    FakeInjectedModule.workspace.clear()


def test_mixed_lengths_come_out_as_generate_gives_them(served: Served, reference: torch.nn.Module) -> None:
    batch = prompts(7, 7, 12, 7, 12, 30, 7, 7, 2)
    served.add(*(request_of(f"r{i}", prompt, 5 + i) for i, prompt in enumerate(batch)))
    served.run()
    expected = {f"r{i}": hf_greedy(reference, prompt, 5 + i) for i, prompt in enumerate(batch)}
    assert served.tokens == expected


def test_a_small_first_batch_does_not_bound_later_ones(served: Served, reference: torch.nn.Module) -> None:
    alone, *others = prompts(5, 9, 9, 9, 9)
    served.add(request_of("alone", alone))
    served.run()
    served.add(*(request_of(f"o{i}", prompt) for i, prompt in enumerate(others)))
    served.run()
    assert served.tokens["alone"] == hf_greedy(reference, alone)
    for i, prompt in enumerate(others):
        assert served.tokens[f"o{i}"] == hf_greedy(reference, prompt)


def test_a_prompt_of_one_token_is_refused_and_hurts_nobody(
    served: Served, reference: torch.nn.Module
) -> None:
    short, other = prompts(1, 6)
    served.add(request_of("short", short), request_of("other", other))
    served.run()
    assert "this engine needs 2" in served.errors["short"]
    assert served.tokens["other"] == hf_greedy(reference, other)


def test_an_aborted_row_changes_nothing_for_the_others(served: Served, reference: torch.nn.Module) -> None:
    gone, kept, later = prompts(8, 8, 8)
    served.add(request_of("gone", gone, 100), request_of("kept", kept))
    served.now += 0.1
    served.step()
    served.step()
    served.scheduler.abort("gone")
    served.add(request_of("later", later))
    served.run()
    assert len(served.tokens["gone"]) == 2
    assert served.tokens["kept"] == hf_greedy(reference, kept)
    assert served.tokens["later"] == hf_greedy(reference, later)


def test_sequences_end_where_the_workspace_ends(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed_inject, "inject", fake_inject)
    served = Served(model, {"max_out_tokens": 20})
    served.add(request_of("a", prompts(15)[0], 100), request_of("b", [3] * 21, 1))
    served.run()
    assert len(served.tokens["a"]) == 5
    assert "at most 20 tokens" in served.errors["b"]


def test_one_layer_at_a_time_is_in_memory(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled: list[list[weakref.ref[torch.Tensor]]] = []

    def inject(model: Any, settings: Any, mesh: Mesh, fill_layer: FillLayer, report: Any) -> FakeInjected:
        def fill(layer: torch.nn.Module) -> None:
            assert all(parameter.is_meta for parameter in layer.parameters())
            assert [ref for refs in filled for ref in refs if ref() is not None] == []
            fill_layer(layer)
            assert not any(parameter.is_meta for parameter in layer.parameters())
            filled.append([weakref.ref(parameter) for parameter in layer.parameters()])

        return fake_inject(model, settings, mesh, fill, report)

    monkeypatch.setattr(deepspeed_inject, "inject", inject)
    fractions: list[float] = []
    engine = DeepSpeedInjectEngine(config_of(model), MESH, lambda fraction, _="": fractions.append(fraction))
    assert len(filled) == MHA.layers
    assert fractions == [(number + 1) / MHA.layers for number in range(MHA.layers)]
    assert not any(parameter.is_meta for parameter in engine._injected.model.parameters())


def test_missing_compilers_are_named_before_anything_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", None)
    with pytest.raises(UnsupportedModel, match=r"nvcc, g\+\+, ninja not found: .*CUDA_HOME.*AutoTP"):
        deepspeed_inject._require_compilers()


def test_kernels_that_do_not_compile_are_refused_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("ninja: build stopped")

    monkeypatch.setattr(deepspeed_inject, "_require_compilers", lambda: None)
    monkeypatch.setattr(deepspeed_inject.deepspeed_comm, "build", fail)
    with pytest.raises(UnsupportedModel, match=r"could not be compiled \(RuntimeError; .*AutoTP"):
        deepspeed_inject._compile(ModuleType("deepspeed"), lambda *_: None)


def test_the_policy_of_deepspeed_is_made_of_a_filled_layer(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The seam in DeepSpeed itself, without its kernels, which need a GPU."""
    from deepspeed.module_inject.containers.llama import LLAMALayerPolicy

    monkeypatch.setattr(deepspeed_inject, "inject", fake_inject)
    asked: list[object] = []
    make = LLAMALayerPolicy.__init__
    with deepspeed_inject._filled_when_exchanged(asked.append):
        LLAMALayerPolicy(None)
        assert asked == []
        layer = AutoModelForCausalLM.from_pretrained(model).model.layers[0]
        policy = LLAMALayerPolicy(layer, inference=True)
        assert asked == [layer]
        assert policy.attention()[0].shape == (3 * MHA.hidden, MHA.hidden)
    assert LLAMALayerPolicy.__init__ is make


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Group, torch.nn.Module]]:
    """A real group over the fake: the worker's static branch, batches formed by the clock."""
    model = make_llama(tmp_path_factory.mktemp("static") / "model", MHA, seed=3)
    changes = {"engine": "fake-inject", "device": "cpu", "parallel_type": "custom", "startup_timeout": 60}
    changes["dtype"] = "auto"
    with running(config_of(model, **changes)) as group:
        yield group, AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


def test_a_real_group_serves_static_batches(group: tuple[Group, torch.nn.Module]) -> None:
    real, reference = group
    assert real.info.max_num_seqs == BATCH
    assert real.info.max_model_len == 1024  # max_out_tokens
    assert re.fullmatch(r"fake-inject-tp1-pp1-float32-[0-9a-f]{12}", real.info.fingerprint)
    batch = prompts(7, 7, 12, 7, 12, 7, 7)
    ended = real.run([request_of(f"r{i}", prompt, 6) for i, prompt in enumerate(batch)])
    assert [one.token_ids for one in ended] == [hf_greedy(reference, prompt, 6) for prompt in batch]


def test_two_ranks_give_the_same_tokens(tmp_path: Path) -> None:
    model = make_llama(tmp_path / "model", MHA, seed=3)
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    changes = {"engine": "fake-inject", "device": "cpu", "parallel_type": "tp", "tp_size": 2}
    batch = prompts(7, 7, 12, 7)
    with running(config_of(model, startup_timeout=300, **changes)) as real:
        assert real.info.tp_size == 2
        ended = real.run([request_of(f"r{i}", prompt, 6) for i, prompt in enumerate(batch)])
    assert [one.token_ids for one in ended] == [hf_greedy(reference, prompt, 6) for prompt in batch]


def test_a_stream_of_a_real_group_is_token_by_token_and_can_be_closed(
    group: tuple[Group, torch.nn.Module],
) -> None:
    real, reference = group
    gone, other = prompts(9, 11)
    assert real.abort_after(request_of("gone", gone, 200), 3) == hf_greedy(reference, gone, 3)
    (ended,) = real.run([request_of("other", other)])
    assert ended.token_ids == hf_greedy(reference, other)
    assert real.idle_stats().num_running == 0


@pytest.mark.parametrize("sampling", [SamplingParams(temperature=0.0), SamplingParams(seed=7)], ids=str)
def test_what_another_group_began_goes_on_with_the_same_tokens(
    group: tuple[Group, torch.nn.Module], sampling: SamplingParams
) -> None:
    """In batches of other lengths than those that it began in."""
    real, _ = group
    batch = prompts(7, 7, 12)
    whole = real.run([request_of(f"w{i}", prompt, 12, sampling=sampling) for i, prompt in enumerate(batch)])
    resumed = [
        request_of(f"r{i}", prompt, 12, sampling=sampling, resume_token_ids=one.token_ids[: 2 + 4 * i])
        for i, (prompt, one) in enumerate(zip(batch, whole, strict=True))
    ]
    ended = real.run(resumed)
    assert [one.token_ids for one in ended] == [one.token_ids[2 + 4 * i :] for i, one in enumerate(whole)]
    assert [one.num_cached_tokens for one in ended] == [None] * 3, "said with the first token"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_real_kernels_give_the_tokens_of_generate(tmp_path: Path, dtype: str) -> None:
    model = make_llama(tmp_path / "model", MHA, seed=3)
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).cuda().eval()
    batch = prompts(7, 7, 12, 7, 12, 30, 7, 7, 2)
    config = config_of(model, dtype=dtype, startup_timeout=600, parallel_type="custom")
    with running(config) as real:
        ended = real.run([request_of(f"r{i}", prompt, 16) for i, prompt in enumerate(batch)])
    assert_tokens_of_generate(reference, batch, ended)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_the_real_kernels_at_the_widths_of_a_7b(tmp_path: Path) -> None:
    """Llama-2-7B's, two layers of it: other kernels may be chosen than for narrow ones."""
    shape = Shape(hidden=4096, layers=2, heads=32, kv_heads=32, head_dim=128, ffn=11008, vocab=32000)
    model = make_llama(tmp_path / "model", shape, seed=3)
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).cuda().eval()
    batch = prompts(7, 7, 12, 7, 120)
    config = config_of(model, dtype="float32", startup_timeout=600, parallel_type="custom")
    with running(config) as real:
        ended = real.run([request_of(f"r{i}", prompt, 16) for i, prompt in enumerate(batch)])
    assert_tokens_of_generate(reference, batch, ended)


def assert_tokens_of_generate(reference: Any, batch: list[list[int]], ended: list[Ended]) -> None:
    for prompt, one in zip(batch, ended, strict=True):
        ids = torch.tensor([prompt], device="cuda")
        how = {"do_sample": False, "min_new_tokens": 16, "max_new_tokens": 16, "pad_token_id": 0}
        out = reference.generate(ids, attention_mask=torch.ones_like(ids), eos_token_id=[], **how)
        assert one.token_ids == out[0, len(prompt) :].tolist()
