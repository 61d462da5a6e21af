"""Every Hugging Face type in stages of several ranks (pptp 2x2): its tokens are `generate`'s, in float32.

`python -m tests.soak.hf_layouts [--trials PROMPTS] [--kinds A,B] [--json FILE]`: so many prompts a type.
What is refused is listed by name, with the reason. Ends with 1 where a token differs, or nothing was served.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from engines.models.hf_support import EXACT_TYPES
from gateway import bench
from tests.engines import harness
from tests.engines.harness import StartFailed, running
from tests.engines.models.hf_models import BASE, make_hf
from tests.engines.models.test_hf import CHANGES
from tests.engines.reference import hf_greedy, prompts, request_of
from tests.engines.test_pipeline import config_for

NUM_TOKENS = 16


def tokens_of(kind: str, model: Path, num_prompts: int) -> dict[str, Any]:
    """How many of the greedy tokens differ, or why the type is refused."""
    batch = prompts(num_prompts, BASE["vocab_size"], seed=17)
    requests = [request_of(f"{i}", prompt, NUM_TOKENS) for i, prompt in enumerate(batch)]
    config = config_for(model, tp_size=2, parallel_type="pptp", startup_timeout=int(harness.START_SECONDS))
    try:
        with running(config) as group:
            found = [ended.token_ids for ended in group.run(requests, timeout=600)]
    except StartFailed as failure:
        outcome = "refused" if "model_type" in str(failure) else "failed"
        return {outcome: str(failure)}
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    expected = [hf_greedy(reference, prompt, NUM_TOKENS) for prompt in batch]
    pairs = [pair for one in zip(found, expected, strict=True) for pair in zip(*one, strict=True)]
    return {"prompts": len(batch), "tokens": len(pairs), "differing": sum(a != b for a, b in pairs)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--kinds", default=",".join(sorted(set(EXACT_TYPES) - {"llama"})))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    harness.START_SECONDS = 600.0  # it may share the machine
    results: dict[str, Any] = {}
    for kind in args.kinds.split(","):
        with tempfile.TemporaryDirectory() as work:
            model = make_hf(Path(work) / kind, kind, num_hidden_layers=3, **CHANGES.get(kind, {}))
            results[kind] = tokens_of(kind, model, args.trials)
        print(f"{kind:10} {results[kind]}", flush=True)
    if args.json:
        command = f"python -m tests.soak.hf_layouts --trials {args.trials} --kinds {args.kinds}"
        figures = {"command": command, "machine": bench.machine(), "layout": "pptp 2x2", **results}
        args.json.write_text(json.dumps(figures, indent=2) + "\n")
    served = [result for result in results.values() if "refused" not in result]
    sys.exit(not served or any(result.get("differing", 1) for result in served))


if __name__ == "__main__":
    main()
