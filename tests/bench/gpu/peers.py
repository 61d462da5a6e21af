"""transformers and DeepSpeed with the requests of the `offline` section, and ours over each."""

from __future__ import annotations

import inspect
import os
import time
from functools import partial
from importlib import import_module
from statistics import median
from typing import Any

from tests.bench.gpu.bench import Bench, Skipped
from tests.bench.gpu.model import DTYPE, load, model_of
from tests.bench.gpu.offline import RATE, Group, beside_ours, make_prompts, make_requests, native_rate
from tests.bench.gpu.timing import timed
from tests.bench.hf_generate import tokens_per_second

_ROUNDS = 2


def measure(bench: Bench) -> None:
    """transformers' section: the same weights, continuous batching and one static batch."""
    from transformers import AutoModelForCausalLM

    directory = model_of(bench.options)
    hf: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=DTYPE).to(bench.device).eval()
    bench.part("generate", lambda: beside_ours(bench, static_batch(bench, hf)))
    # Last, for it keeps most of the device's memory, and another attention in the model.
    bench.part("continuous batching", lambda: beside_ours(bench, continuous_batching(bench, hf)))


def continuous_batching(bench: Bench, hf: Any) -> float:
    """Output tokens a second; what it keeps between calls, recordings too, is there after the first."""
    from transformers import GenerationConfig

    options = bench.options
    greedy = GenerationConfig(
        max_new_tokens=options.output_len, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    known = inspect.signature(hf.generate_batch).parameters
    keeping = {"persistent_manager": True} if "persistent_manager" in known else {}
    counts: list[int] = []

    def run(seed: int) -> None:
        out = hf.generate_batch(make_prompts(options, seed), generation_config=greedy, **keeping)
        counts.append(sum(len(each.generated_tokens) for each in out.values()))

    run(seed=0)
    seconds = [timed(partial(run, seed), bench.device) for seed in range(1, _ROUNDS + 1)]
    if min(counts) < options.num_output_tokens:
        raise RuntimeError(f"{min(counts)} tokens came, not {options.num_output_tokens}")
    return options.num_output_tokens / median(seconds)


def static_batch(bench: Bench, hf: Any) -> float:
    options = bench.options
    size = (options.num_requests, options.prompt_len, options.output_len)
    rates = [tokens_per_second(hf, *size, seed=seed) for seed in range(_ROUNDS + 1)]
    return median(rates[1:])


def measure_deepspeed(bench: Bench) -> None:
    """DeepSpeed's injected kernels, driven by our own engine of that name: `generate` cannot, for the kernels
    keep K/V of which transformers knows nothing. They know no shared K/V heads, so that both sides get a
    model with a head of its own for each query's."""
    if not bench.options.is_cuda:
        raise Skipped("DeepSpeed's kernels are for CUDA devices")
    os.environ["DS_ACCELERATOR"] = "cuda"
    import_module("deepspeed")
    directory = model_of(bench.options, has_own_kv_heads=True)
    bench.part("ours", lambda: {RATE: round(native_rate(bench, load(directory, bench.device)), 1)})
    bench.part("kernel injection", lambda: {RATE: round(injected_rate(bench), 1)})
    ours, its = (bench.of("deepspeed", part, RATE) for part in ("ours", "kernel injection"))
    if ours is not None and its is not None:
        bench.put("ours_over_it", round(ours / its, 3))


def injected_rate(bench: Bench) -> float:
    from engines.config import ModelConfig
    from engines.deepspeed_inject import DeepSpeedInjectEngine
    from engines.runtime.mesh import single
    from engines.runtime.runner import ModelRunner
    from engines.runtime.static import StaticScheduler

    options = bench.options
    config = ModelConfig(
        model_name="bench",
        served_model_names=("bench",),
        model_path=str(model_of(options, has_own_kv_heads=True)),
        engine="deepspeed_inject",
        device="cuda",
        dtype="bfloat16",
        batch_size=options.num_requests,
    )
    mesh = single(bench.device)
    engine = DeepSpeedInjectEngine(config, mesh, lambda *_: None)
    scheduler = StaticScheduler(
        options.num_requests, 1.0, engine.max_model_len, [], time.monotonic, vocab_size=engine.vocab_size
    )
    group = Group(options, scheduler, ModelRunner(engine, mesh, (), options.num_requests), plans_in_flight=1)
    seconds = [group.seconds(make_requests(options, seed)) for seed in range(_ROUNDS + 1)]
    return options.num_output_tokens / median(seconds[1:])
