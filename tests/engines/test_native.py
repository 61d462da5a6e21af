"""The native engine against Hugging Face's own Llama: equal tokens in float32, no worse in half precision."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from engines.base import Engine, UnsupportedModel
from engines.native import NativeEngine
from engines.runtime.context import ForwardContext, forward_context
from engines.runtime.mesh import Mesh
from tests.engines.driver import Driver, generate, make_batch, native
from tests.models import GQA, MHA, ODD, Shape, make_llama

NUM_TOKENS = 24


def prompts_for(vocab: int, *lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(2, vocab, (n,), generator=generator).tolist() for n in lengths]


def hf_greedy(directory: Path, prompt: list[int], num_tokens: int) -> list[int]:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=num_tokens,
        do_sample=False,
        eos_token_id=model.config.vocab_size,  # none
        pad_token_id=0,
    )
    return cast(list[int], out[0, len(prompt) :].tolist())


@pytest.mark.parametrize("shape", [MHA, GQA, ODD], ids=["mha", "gqa", "odd"])
def test_greedy_tokens_equal_hugging_face(tmp_path: Path, shape: Shape) -> None:
    directory = make_llama(tmp_path, shape, seed=3)
    prompts = prompts_for(shape.vocab, 1, 7, 33, 90)
    expected = [hf_greedy(directory, prompt, NUM_TOKENS) for prompt in prompts]
    engine = native(directory)
    assert [generate(engine, [prompt], NUM_TOKENS, chunk=1000)[0] for prompt in prompts] == expected
    assert generate(engine, prompts, NUM_TOKENS, chunk=9, stagger=2, block_size=16) == expected
    assert generate(engine, prompts, NUM_TOKENS, chunk=5, stagger=1, block_size=3) == expected


@torch.inference_mode()
def logits_of(engine: NativeEngine, ids: list[int], num_prefilled: int) -> torch.Tensor:
    """[T, V] of one sequence, the tokens after `num_prefilled` decoded one by one."""
    driver = Driver(engine, len(ids), 16)
    row, logits = driver.add(ids, 0), []
    for count in [num_prefilled] + [1] * (len(ids) - num_prefilled):
        batch = make_batch([row], [count], 16)
        with forward_context(ForwardContext(batch, driver.caches)):
            hidden = engine.forward(batch)
        rows = engine.logits(hidden)
        assert rows is not None
        logits.append(rows)
        row.num_computed += count
    return torch.cat(logits)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_no_further_off_than_hugging_faces(tmp_path: Path, dtype: str) -> None:
    from transformers import AutoModelForCausalLM

    directory = make_llama(tmp_path, GQA, seed=4)
    ids = prompts_for(GQA.vocab, 96)[0]
    with torch.inference_mode():
        exact, theirs = (
            AutoModelForCausalLM.from_pretrained(directory, dtype=kind)(torch.tensor([ids])).logits[0].float()
            for kind in (torch.float32, getattr(torch, dtype))
        )
    ours = logits_of(native(directory, dtype=dtype), ids, 32)
    assert ours.dtype == torch.float32
    assert (ours - exact).norm() < 1.2 * (theirs - exact).norm()


def test_the_dtype_is_that_of_the_weights_unless_said(tmp_path: Path) -> None:
    directory = make_llama(tmp_path, MHA, dtype=torch.float16)
    assert native(directory).kv_spec.dtype is torch.float16
    assert native(directory, dtype="float32").kv_spec.dtype is torch.float32


def test_progress_ends_at_one(tmp_path: Path) -> None:
    fractions: list[float] = []
    native(make_llama(tmp_path, ODD), report=fractions.append)
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0


def test_it_is_an_engine(tmp_path: Path) -> None:
    engine = native(make_llama(tmp_path, GQA), max_model_len=128)
    assert isinstance(engine, Engine)
    assert (engine.vocab_size, engine.max_model_len, engine.plans_in_flight) == (GQA.vocab, 2048, 1)
    assert (engine.kv_spec.num_layers, engine.kv_spec.num_kv_heads) == (GQA.layers, GQA.kv_heads)


def test_pipelines_are_refused_before_weights_are_read(tmp_path: Path) -> None:
    directory = make_llama(tmp_path, GQA)
    (directory / "model.safetensors").unlink()
    mesh = Mesh(rank=0, tp_size=1, pp_size=2, device=torch.device("cpu"))
    with pytest.raises(UnsupportedModel, match="use engine: pipeline"):
        native(directory, mesh)


LARGE = Shape(hidden=512, layers=6, heads=8, kv_heads=8, head_dim=64, ffn=2048, vocab=8192)

LOAD_AND_MEASURE = """
import sys
from pathlib import Path
import torch
from engines.runtime.mesh import Mesh
from tests.engines.driver import native; from tests.models import MHA, make_llama

def resident(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024

torch.set_num_threads(1)
native(make_llama(Path(sys.argv[2]), MHA, dtype=torch.bfloat16))
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
engine = native(Path(sys.argv[1]), Mesh(rank=3, tp_size=4, pp_size=1, device=torch.device("cpu")))
print(resident("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_a_rank_takes_its_share_of_memory(tmp_path: Path) -> None:
    directory = make_llama(tmp_path / "large", LARGE, dtype=torch.bfloat16)
    size = (directory / "model.safetensors").stat().st_size
    command = [sys.executable, "-c", LOAD_AND_MEASURE, str(directory), str(tmp_path / "small")]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120, cwd=root)
    assert int(done.stdout) < size / 4 + size / 6
