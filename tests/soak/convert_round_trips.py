"""Many random models, each through a tour of layouts; the files for ranks are served as well.

    python -m tests.soak.convert_round_trips [--trials N] [--json FILE]

Every layout must hold the same bits, greedy tokens from the per-rank files must be Hugging Face's, and files
that are quantised and then divided anew must be those that are quantised after division. Ends with 1 where
one is not.
"""

from __future__ import annotations

import random
import tempfile
from collections import Counter
from pathlib import Path

import torch

from conversion.open import open_checkpoint
from conversion.plan import Target
from conversion.verify import differences
from tests.conversion.helpers import Case, assert_same_weights, convert, random_case
from tests.engines.driver import generate, native
from tests.engines.test_native import hf_greedy, prompts_for
from tests.models import make_llama
from tests.soak import _figures

NUM_TOKENS = 8
FIRST_SEED = 1000


def tour(root: Path, seed: int) -> Counter[str]:
    """What was compared. Raises AssertionError."""
    case = random_case(seed)
    first = current = make_llama(root / "first", case.shape, seed, case.dtype)
    prompts = prompts_for(case.shape.vocab, 5, 21)
    expected = [hf_greedy(first, prompt, NUM_TOKENS) for prompt in prompts]
    counts = Counter(models=1)
    for number, target in enumerate(case.targets):
        convert(current, root / str(number), target)
        current = root / str(number)
        assert_equal(first, current)
        counts["layouts"] += 1
        if target.format == "sluice":
            engine = native(current, dtype="float32", reshard=True)
            assert generate(engine, prompts, NUM_TOKENS) == expected, target
            counts["served"] += 1
            counts["tokens"] += sum(map(len, expected))
    assert_same_weights(first, current)
    return counts + quantised(root, first, case, seed)


def quantised(root: Path, first: Path, case: Case, seed: int) -> Counter[str]:
    """To one layout and from there to another, and straight to the other."""
    kind = random.Random(seed).choice(("int8", "fp8"))
    one, other = [target for target in case.targets if target.format == "sluice"]
    convert(first, root / "one", Target("sluice", tp=one.tp, pp=one.pp, quantize=kind))
    convert(root / "one", root / "divided", other)
    convert(first, root / "other", Target("sluice", tp=other.tp, pp=other.pp, quantize=kind))
    assert_equal(root / "divided", root / "other")
    return Counter(quantised=1)


def assert_equal(one: Path, other: Path) -> None:
    found = list(differences(open_checkpoint(one), open_checkpoint(other)))
    assert not found, found


def run(trials: int) -> dict[str, object]:
    torch.set_num_threads(1)
    counts, failures = Counter[str](), list[str]()
    for seed in range(FIRST_SEED, FIRST_SEED + trials):
        with tempfile.TemporaryDirectory() as root:
            try:
                counts += tour(Path(root), seed)
            except Exception as error:
                failures.append(f"seed {seed}: {random_case(seed)}: {type(error).__name__}: {error}"[:2000])
    return {**counts, "failed": len(failures), "failures": failures}


if __name__ == "__main__":
    _figures.main("convert_round_trips", __doc__, 300, run)
