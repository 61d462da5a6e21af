"""What int8 changes in the answers of the native engine on this CPU, beside the same model as it is.

    python -m tests.bench.bench_quantized [--prompts N] [--json FILE]

The demo model in bfloat16. Greedy tokens are counted up to the first that differs, for after it the texts are
different ones; logits are those of the prompts' last tokens, error over the norm of the plain ones.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer

from conversion.plan import Target
from engines.base import Engine
from gateway import bench
from tests.conversion.helpers import convert
from tests.conversion.test_quantize import logits_of
from tests.engines.driver import generate, native

DEMO = Path(__file__).parents[2] / "gateway" / "demo_model"
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


def agreeing(one: list[int], other: list[int]) -> int:
    """Tokens before the first that differs."""
    pairs = zip(one, other, strict=True)
    return next((number for number, (a, b) in enumerate(pairs) if a != b), len(one))


def logit_error(plain: Engine, small: Engine, prompts: list[list[int]]) -> float:
    pairs = [(logits_of(plain, ids)[-1], logits_of(small, ids)[-1]) for ids in prompts]
    return max(float((b - a).norm() / a.norm()) for a, b in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--prompts", type=int, default=len(TOPICS) * len(FORMS))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    texts = [form.format(topic) for form in FORMS for topic in TOPICS][: args.prompts]
    prompts = [tokenizer.encode(text).ids for text in texts]
    with tempfile.TemporaryDirectory() as root:
        manifest = convert(DEMO, Path(root) / "int8", Target("sluice", quantize="int8"))
        plain, small = native(DEMO, dtype="bfloat16"), native(Path(root) / "int8", dtype="bfloat16")
        pairs = list(zip(*(generate(e, prompts, NUM_TOKENS) for e in (plain, small)), strict=True))
        tensors = [
            t for file in manifest.files.values() for t in file.tensors.values() if t.error is not None
        ]
        record = {
            "command": f"python -m tests.bench.bench_quantized --prompts {len(prompts)}",
            "machine": bench.machine(),
            "greedy_tokens": sum(len(one) for one, _ in pairs),
            "agreeing_before_the_first_difference": sum(agreeing(one, other) for one, other in pairs),
            "answers": len(pairs),
            "answers_identical": sum(one == other for one, other in pairs),
            "largest_relative_logit_error": logit_error(plain, small, prompts),
            "mean_relative_weight_error": sum(t.error or 0 for t in tensors) / len(tensors),
        }
    print(json.dumps(record, indent=2))
    if args.json is not None:
        args.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
