"""AutoTP over real ranks: every type of model that is served at all is exact, or refused by name."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from engines.base import UnsupportedModel
from engines.config import ModelConfig
from engines.deepspeed_tp import DeepSpeedTPEngine, check_split
from engines.models import deepspeed_comm
from engines.models.hf_inspect import inspect_model
from engines.models.hf_support import EXACT_TYPES
from engines.runtime.mesh import Mesh
from tests.engines.ranks import Special, expected_tokens, make_models, run_ranks

SPECIAL: Special = {
    "three_kv_heads": ("llama", {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "norms_of_heads": ("stablelm", {"qk_layernorm": True}),
    "phi_norms": ("phi", {"qk_layernorm": True}),
    "cohere_norms": ("cohere", {"use_qk_norm": True}),
    "four_kv_heads": ("llama", {"num_key_value_heads": 4}),
}
FOUR_RANKS = {"four_kv_heads", "mistral"}
REFUSED = {
    "glm": "packed projection",
    "glm4": "packed projection",
    "phi3": "packed projection",
    "olmo2": "belongs to all attention heads together",
    "norms_of_heads": "belongs to all attention heads together",
    "cohere_norms": "belongs to all attention heads together",
}


def config_of(model: Path, tp: int, **changes: Any) -> ModelConfig:
    settings = {"model_name": "m", "served_model_names": ("m",), "model_path": str(model), "tp_size": tp}
    return ModelConfig(**settings | {"engine": "deepspeed_tp", "dtype": "float32"} | changes)


def load(model: Path, mesh: Mesh) -> DeepSpeedTPEngine:
    return DeepSpeedTPEngine(config_of(model, mesh.tp_size), mesh, lambda *_: None)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("models"), SPECIAL)


@pytest.fixture(scope="module")
def expected(models: Path) -> dict[str, list[list[int]]]:
    return expected_tokens(models, SPECIAL)


@pytest.fixture(scope="module")
def on_two_ranks(models: Path) -> dict[str, Any]:
    return run_ranks(2, models, sorted({*EXACT_TYPES, *SPECIAL}), load)


@pytest.mark.parametrize("name", sorted({*EXACT_TYPES, *SPECIAL} - set(REFUSED)))
def test_two_ranks_give_the_tokens_of_generate(
    name: str, on_two_ranks: dict[str, Any], expected: dict[str, list[list[int]]]
) -> None:
    assert on_two_ranks[name] == expected[name]


class FakeBuilder:
    """In the place of DeepSpeed's: it compiles nothing, but leaves what a compiler would."""

    @staticmethod
    def load(verbose: bool) -> None:
        assert not verbose
        name = deepspeed_comm.ALL_REDUCE.name
        path = Path(os.environ["TORCH_EXTENSIONS_DIR"], name, f"{name}.so")
        path.parent.mkdir(exist_ok=True)
        path.touch()


def test_a_start_that_has_to_compile_says_so_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "")  # build sets it: let that end with the test
    deepspeed = ModuleType("deepspeed")
    accelerator = SimpleNamespace(create_op_builder=lambda name: FakeBuilder)
    deepspeed.accelerator = SimpleNamespace(get_accelerator=lambda: accelerator)  # type: ignore[attr-defined]
    phases: list[str] = []
    for _ in range(2):
        deepspeed_comm.build(
            deepspeed, deepspeed_comm.ALL_REDUCE, lambda _, phase="load": phases.append(phase)
        )
    assert phases == ["compile", "load", "load"]
    [built] = tmp_path.glob("**/*.so")
    os.utime(built, (0, 0))  # the packages have been installed anew
    assert not deepspeed_comm.ALL_REDUCE.is_compiled


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_deepspeed_would_split_wrongly_is_refused(name: str, on_two_ranks: dict[str, Any]) -> None:
    assert REFUSED[name] in on_two_ranks[name]
    assert "use engine: accelerate" in on_two_ranks[name]


def test_no_name_is_left_in_shared_memory(on_two_ranks: dict[str, Any]) -> None:
    assert on_two_ranks
    assert not list(Path("/dev/shm").glob(f"*pid{os.getpid()}*"))


def test_four_ranks(models: Path, expected: dict[str, list[list[int]]]) -> None:
    found = run_ranks(4, models, sorted(FOUR_RANKS), load)
    assert found["four_kv_heads"] == expected["four_kv_heads"]
    assert "num_key_value_heads (2) is less than 4 ranks" in found["mistral"]


def test_more_ranks_than_kv_heads_are_refused_before_weights_are_read(models: Path) -> None:
    mesh = Mesh(rank=0, tp_size=3, pp_size=1, device=torch.device("cpu"))
    with pytest.raises(UnsupportedModel, match=r"num_key_value_heads \(2\) .* to 2 or less"):
        check_split(inspect_model(models / "llama", None), mesh)


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch, models: Path) -> None:
    monkeypatch.setattr(deepspeed_comm, "find_spec", lambda name: None)
    mesh = Mesh(rank=0, tp_size=1, pp_size=1, device=torch.device("cpu"))
    with pytest.raises(UnsupportedModel, match=r"pip install -e '\.\[deepspeed\]'"):
        DeepSpeedTPEngine(config_of(models / "llama", 1), mesh, lambda *_: None)


@pytest.mark.parametrize(
    ("world_size", "device", "num_cores", "reason"),
    [
        (2, "cuda", 8, "shared memory is for CPUs"),
        (4, "cpu", 2, "4 ranks would spin on 2 cores"),
        (1 << 20, "cpu", 1 << 20, "MiB free"),
    ],
)
def test_why_the_groups_own_backend_reduces(
    world_size: int, device: str, num_cores: int, reason: str
) -> None:
    assert reason in deepspeed_comm.reason_for_the_backend(world_size, device, num_cores)


def test_a_missing_compiler_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed_comm.shutil, "which", lambda tool: None)
    assert "g++ and ninja not found" in deepspeed_comm.reason_for_the_backend(2, "cpu", 2)
