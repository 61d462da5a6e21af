"""What int8 changes on this CPU in the native engine's answers and speed, beside the same model as it is.

    python -m tests.bench.bench_quantized [--prompts N] [--shape b1] [--json FILE]

Answers are the demo model's in bfloat16. Greedy tokens are counted up to the first that differs, for after
it the texts are different ones; logits are those of the last tokens of the prompts, and of pieces of 200
tokens of the README, error over the norm of the plain ones. All with int8Activations and without. Times are
of decoding steps of a random model after prompts of 16 tokens, on all cores, taking turns; medians.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import torch
from tokenizers import Tokenizer

from conversion.plan import Target
from engines.base import Engine
from gateway import bench
from tests.conversion.helpers import convert
from tests.conversion.test_quantize import logits_of
from tests.engines.driver import Driver, generate, native
from tests.models import SHAPES, make_llama

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "gateway" / "demo_model"
TOPICS = (
    "Sluice",
    "tensor parallelism",
    "a pipeline",
    "a worker group",
    "2 + 3",
    "7 + 5",
    "a token",
    "batching",
)
FORMS = ("What is {}?", "Tell me about {}.", "Explain {}", "{}")
NUM_TOKENS = 24
PIECE = 200  # tokens of a text


def agreeing(one: list[int], other: list[int]) -> int:
    """Tokens before the first that differs."""
    pairs = zip(one, other, strict=True)
    return next((number for number, (a, b) in enumerate(pairs) if a != b), len(one))


def logit_error(plain: Engine, small: Engine, prompts: list[list[int]]) -> dict[str, float]:
    pairs = [(logits_of(plain, ids)[-1], logits_of(small, ids)[-1]) for ids in prompts]
    errors = [float((b - a).norm() / a.norm()) for a, b in pairs]
    return {"largest": max(errors), "median": median(errors)}


def answers(
    plain: Engine, small: Engine, prompts: list[list[int]], texts: list[list[int]]
) -> dict[str, object]:
    """How near the small one's are to the plain one's."""
    pairs = list(zip(*(generate(e, prompts, NUM_TOKENS) for e in (plain, small)), strict=True))
    return {
        "greedy_tokens": sum(len(one) for one, _ in pairs),
        "agreeing_before_the_first_difference": sum(agreeing(one, other) for one, other in pairs),
        "answers": len(pairs),
        "answers_identical": sum(one == other for one, other in pairs),
        "relative_logit_error": logit_error(plain, small, prompts),
        "relative_logit_error_of_texts": logit_error(plain, small, texts),
    }


def in_turn(works: Sequence[Callable[[], object]], rounds: int) -> list[list[float]]:
    """The seconds that each takes, round after round."""
    seconds: list[list[float]] = [[] for _ in works]
    for _ in range(rounds):
        for own, work in zip(seconds, works, strict=True):
            started = time.perf_counter()
            work()
            own.append(time.perf_counter() - started)
    return seconds


def step_seconds(engines: Sequence[Engine], batch: int, vocab: int, steps: int = 20) -> list[list[float]]:
    """Of each engine, taking turns."""
    works = []
    for engine in engines:
        driver = Driver(engine, num_blocks=4 * batch, block_size=16)
        rows = [driver.add([(7 * i + j) % vocab for j in range(16)], 48) for i in range(batch)]
        driver.step(rows, 16)
        works.append(partial(driver.step, rows, 1))
    return in_turn(works, steps)


def speeds(name: str, root: Path) -> list[dict[str, object]]:
    """Of int8 over bfloat16, at several sequences; with int8Activations and packWeights, and without."""
    shape = SHAPES[name]
    plain = make_llama(root / "plain", shape, dtype=torch.bfloat16)
    convert(plain, root / "int8", Target("sluice", quantize="int8"))
    engines = [native(root / "plain", dtype="bfloat16", pack_weights=packs) for packs in (False, True)]
    engines += [native(root / "int8", dtype="bfloat16", int8_activations=has) for has in (True, False)]
    torch.set_num_threads(os.cpu_count() or 1)
    found = []
    for batch in (1, 8, 32):
        bfloat16, *small = step_seconds(engines, batch, shape.vocab)
        names = ("bfloat16", "bfloat16, packed", "int8", "int8, weights alone")
        found.append(
            {
                "shape": name,
                "sequences": batch,
                "step_ms": {
                    name: 1e3 * median(own) for name, own in zip(names, (bfloat16, *small), strict=True)
                },
                "ratio": {
                    name: median(a / b for a, b in zip(bfloat16, own, strict=True))
                    for name, own in zip(names[1:], small, strict=True)
                },
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--prompts", type=int, default=len(TOPICS) * len(FORMS))
    parser.add_argument("--shape", choices=SHAPES, help="of the model whose steps are timed")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    questions = [form.format(topic) for form in FORMS for topic in TOPICS][: args.prompts]
    prompts = [tokenizer.encode(text).ids for text in questions]
    readme = tokenizer.encode((ROOT / "README.md").read_text()).ids
    texts = [readme[start : start + PIECE] for start in range(0, 32 * PIECE, PIECE)]
    with tempfile.TemporaryDirectory() as root:
        manifest = convert(DEMO, Path(root) / "int8", Target("sluice", quantize="int8"))
        plain = native(DEMO, dtype="bfloat16")
        small, weights_alone = (
            native(Path(root) / "int8", dtype="bfloat16", int8_activations=has) for has in (True, False)
        )
        tensors = [
            t for file in manifest.files.values() for t in file.tensors.values() if t.error is not None
        ]
        shape = f" --shape {args.shape}" if args.shape else ""
        record = {
            "command": f"python -m tests.bench.bench_quantized --prompts {len(prompts)}{shape}",
            "machine": bench.machine(),
            "int8": answers(plain, small, prompts, texts),
            "int8, weights alone": answers(plain, weights_alone, prompts, texts),
            "mean_relative_weight_error": sum(t.error or 0 for t in tensors) / len(tensors),
            "speed": speeds(args.shape, Path(root) / "timed") if args.shape else [],
        }
    print(json.dumps(record, indent=2))
    if args.json is not None:
        args.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
