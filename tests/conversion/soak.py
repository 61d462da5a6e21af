"""Many random models, each through a tour of layouts; the files for ranks are served as well.

    python -m tests.conversion.soak --count 300

Every layout must hold the same bits, and greedy tokens from the per-rank files must be Hugging Face's.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from conversion.open import open_checkpoint
from conversion.verify import differences
from tests.conversion.helpers import assert_same_weights, convert, random_case
from tests.engines.driver import generate
from tests.engines.test_native import hf_greedy, native, prompts_for
from tests.models import make_llama

NUM_TOKENS = 8


def tour(root: Path, seed: int) -> int:
    """The number of layouts. Raises AssertionError."""
    case = random_case(seed)
    first = current = make_llama(root / "first", case.shape, seed, case.dtype)
    prompts = prompts_for(case.shape.vocab, 5, 21)
    expected = [hf_greedy(first, prompt, NUM_TOKENS) for prompt in prompts]
    for number, target in enumerate(case.targets):
        convert(current, root / str(number), target)
        current = root / str(number)
        assert not list(differences(open_checkpoint(first), open_checkpoint(current))), target
        if target.format == "sluice":
            engine = native(current, dtype="float32", reshard=True)
            assert generate(engine, prompts, NUM_TOKENS) == expected, target
    assert_same_weights(first, current)
    return len(case.targets)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    layouts = 0
    for seed in range(args.seed, args.seed + args.count):
        with tempfile.TemporaryDirectory() as root:
            try:
                layouts += tour(Path(root), seed)
            except Exception as error:
                error.add_note(f"seed {seed}: {random_case(seed)}")
                raise
    print(f"{args.count} models through {layouts} layouts: equal bits, equal tokens")


if __name__ == "__main__":
    main()
