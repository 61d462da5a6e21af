"""`sluice parity`: what counts as equal, which layouts there are, and one run over real groups."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from engines.config import ModelConfig
from gateway import cli, parity
from gateway.parity_compare import Answer, Comparison, Verdict, compare
from gateway.parity_layouts import BadLayout, Layout, choose
from tests.models import GQA, make_llama


def answer(tokens: list[int], logprob: float = -1.0, margin: float = 1.0) -> Answer:
    top = [[(token, logprob), (99, logprob - margin)] for token in (1, 2, 3)]
    return Answer(tokens, [logprob] * 3, top)


REFERENCE = [answer([1, 2, 3]), answer([1, 2, 3], margin=1e-4)]


def test_equal_tokens_are_identical() -> None:
    found = compare("x", REFERENCE, [answer([1, 2, 3], -1.0001), answer([1, 2, 3], margin=1e-4)], "float32")
    assert found.verdict is Verdict.IDENTICAL
    assert (found.num_equal, found.num_tokens, found.num_forced_equal) == (6, 6, 6)
    assert found.first is None
    assert found.max_top_logprob_difference == pytest.approx(1e-4)


def test_a_near_tie_may_fall_either_way() -> None:
    found = compare("x", REFERENCE, [answer([1, 2, 3]), answer([1, 99, 3], -1.0001, 1e-4)], "float32")
    assert found.verdict is Verdict.NUMERICS
    assert found.first is not None
    assert (found.first.prompt, found.first.position, found.first.token) == (1, 1, 99)
    assert found.first.margin == pytest.approx(1e-4)
    assert found.num_equal == 4  # what follows the first difference does not count


def test_a_clear_choice_must_not_turn() -> None:
    found = compare("x", REFERENCE, [answer([1, 99, 3]), answer([1, 2, 3])], "float32")
    assert found.verdict is Verdict.WRONG


@pytest.mark.parametrize("logprob", [-1.01, math.nan])
def test_scores_that_rounding_does_not_explain_are_wrong(logprob: float) -> None:
    answers = [answer([1, 2, 3]), answer([1, 2, 3], logprob)]
    assert compare("x", REFERENCE, answers, "float32").verdict is Verdict.WRONG


def of_top(*tops: tuple[int, float]) -> Answer:
    """One token, whose own log-probability is the same in all of them."""
    return Answer([1], [-1.0], [[(1, -1.0), *tops]])


@pytest.mark.parametrize(
    ("tops", "expected"),
    [
        ([(2, -2.0), (3, -3.0)], 0.0),
        ([(2, -2.0), (3, -3.5)], 0.5),  # both name it
        ([(2, -2.0), (4, -2.9)], 0.1),  # to the first, 4 is at most as likely as 3
        ([(5, -1.5), (2, -2.0)], 1.5),
    ],
)
def test_the_largest_difference_is_over_all_likely_tokens(
    tops: list[tuple[int, float]], expected: float
) -> None:
    reference, other = [of_top((2, -2.0), (3, -3.0))], [of_top(*tops)]
    for found in (compare("x", reference, other, "float32"), compare("x", other, reference, "float32")):
        assert found.max_top_logprob_difference == pytest.approx(expected)
        assert found.verdict is (Verdict.WRONG if expected else Verdict.IDENTICAL)


IDENTICAL, NUMERICS, REFUSED = Verdict.IDENTICAL, Verdict.NUMERICS, Verdict.REFUSED


@pytest.mark.parametrize(
    ("dtype", "verdicts", "is_wrong", "is_empty"),
    [
        ("float32", [IDENTICAL, REFUSED, Verdict.SKIPPED], False, False),
        ("float32", [IDENTICAL, NUMERICS], True, False),
        ("bfloat16", [IDENTICAL, NUMERICS], False, False),
        ("bfloat16", [IDENTICAL, Verdict.WRONG], True, False),
        ("float32", [IDENTICAL, Verdict.FAILED], True, False),
        ("float32", [REFUSED, Verdict.SKIPPED], False, True),
        ("float32", [], False, True),
    ],
)
def test_what_is_good_depends_on_the_dtype_and_something_must_be_compared(
    dtype: str, verdicts: list[Verdict], is_wrong: bool, is_empty: bool
) -> None:
    result = parity.Result("r", dtype, [Comparison(name="x", verdict=verdict) for verdict in verdicts])
    assert (result.is_wrong, result.is_empty) == (is_wrong, is_empty)
    assert ("every token" in "".join(parity.notes(result))) == (is_wrong and NUMERICS in verdicts)


def test_what_rounding_explains_depends_on_the_dtype() -> None:
    answers = [answer([1, 2, 3]), answer([1, 2, 3], -1.01, margin=1e-4)]
    assert compare("x", REFERENCE, answers, "bfloat16").verdict is Verdict.IDENTICAL


def test_missing_tokens_part() -> None:
    found = compare("x", REFERENCE, [answer([1, 2]), answer([1, 2, 3])], "float32")
    assert found.first is not None
    assert (found.first.position, found.first.token) == (2, -1)


def test_layouts_by_name() -> None:
    assert choose(["native:tp2", "pipeline:tp2pp2", "pipeline:pp3"]) == [
        Layout("native", 2),
        Layout("pipeline", 2, 2),
        Layout("pipeline", 1, 3),
    ]
    assert Layout("native") in choose([])
    assert {layout.engine for layout in choose([])} >= {"native", "pipeline", "deepspeed_tp", "accelerate"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [("native:2", "ENGINE:tpN"), ("nativ", "did you mean 'native'"), ("native:tp0", "1 or more")],
)
def test_a_wrong_layout_is_explained(name: str, expected: str) -> None:
    with pytest.raises(BadLayout, match=expected):
        choose([name])


def test_what_the_machine_cannot_hold_is_skipped() -> None:
    assert "needs 2 GPUs, there are 1" in Layout("native", 2).why_not_here("cuda", 1)
    assert "at most 4" in Layout("native", 8).why_not_here("cpu", 0)
    assert Layout("native", 4).why_not_here("cpu", 0) == ""


def test_a_layouts_configuration() -> None:
    base = ModelConfig(model_name="m", served_model_names=("m",), model_path="/m", num_replicas=3)
    config = Layout("pipeline", 2, 2).config_from(base, num_cores=8)
    assert (config.parallel_type, config.world_size, config.omp_threads) == ("pptp", 4, 2)
    assert config.num_replicas == 1
    assert Layout("accelerate").config_from(base, 8).parallel_type == "custom"


def test_prompts_of_a_file(tmp_path: Path) -> None:
    base = ModelConfig(model_name="m", served_model_names=("m",), model_path=str(tmp_path))
    file = tmp_path / "prompts"
    file.write_text("[1, 2, 3]\n\n[4]\n")
    assert parity.read_prompts(file, base) == [[1, 2, 3], [4]]
    for text, expected in (("", "no prompt"), ("[1, x]", ":1: not a list"), ("hello", "tokenizer.json does")):
        file.write_text(text)
        with pytest.raises(parity.CannotCompare, match=expected):
            parity.read_prompts(file, base)


def test_metas_checkpoint_has_to_be_converted_first(tmp_path: Path) -> None:
    (tmp_path / "consolidated.00.pth").touch()
    result = CliRunner().invoke(cli.app, ["parity", str(tmp_path)])
    assert result.exit_code == 2
    assert f"run `sluice convert {tmp_path} {tmp_path}-sluice --to sluice`" in result.stderr


SMALL_QUEUE = """
handler:
  model_path: model
parallelType: tp
parallelLevel: 2
maxNumSeqs: 2
jobQueueSize: 1
"""


def test_real_groups_beside_transformers(tmp_path: Path) -> None:
    """More prompts than the groups take at once."""
    make_llama(tmp_path / "model", GQA, seed=3)
    model = tmp_path / "model-config.yaml"
    model.write_text(SMALL_QUEUE)
    out = tmp_path / "out.json"
    engines = "native:tp2,deepspeed_tp:tp4"
    argv = ["parity", str(model), "--engines", engines, "--reference", "hf", "--num-prompts", "6"]
    result = CliRunner().invoke(cli.app, [*argv, "--max-tokens", "8", "--device", "cpu", "--json", str(out)])
    assert result.exit_code == 0, result.output
    native, deepspeed = json.loads(out.read_text())["comparisons"]
    assert native["verdict"] == "identical"
    assert native["num_equal"] == native["num_forced_equal"] == 48
    assert 0 < native["max_top_logprob_difference"] < 1e-3
    assert deepspeed["verdict"] == "refused"
    assert "num_key_value_heads" in deepspeed["reason"]
    assert "identical" in result.output


@pytest.mark.parametrize("is_terminal", [False, True])
def test_the_table_breaks_no_word_where_there_is_no_terminal(is_terminal: bool) -> None:
    parting = compare("deepspeed_tp:tp2", REFERENCE, [answer([1, 2, 3]), answer([1, 99, 3])], "float32")
    same = compare("native:tp1", REFERENCE, REFERENCE, "float32")
    out = io.StringIO()
    console = Console(file=out, width=60, force_terminal=is_terminal, color_system=None)
    parity.show(parity.Result("native:tp2", "float32", [parting, same]), console)
    table, _, explained = out.getvalue().rpartition("\nequal tokens: ")
    assert "identical" in table
    assert ("prompt 1, token 1, margin 0.0001" in table) == (not is_terminal)
    assert max(map(len, table.splitlines())) <= 60 or not is_terminal
    assert "forced: places where, given the reference's tokens so far" in " ".join(explained.split())


def test_a_reference_that_cannot_be_had_ends_it(tmp_path: Path) -> None:
    model = make_llama(tmp_path / "model", GQA)
    (model / "model.safetensors").unlink()
    for argv in (["--reference", "hf"], ["--engines", "native:tp1,native:tp2"]):
        result = CliRunner().invoke(cli.app, ["parity", str(model), "--device", "cpu", *argv])
        assert result.exit_code == 2
        assert "safetensors" in result.output
        assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--engines", "native:tp1"], "there is only native:tp1: name a second engine"),
        (["--engines", "native:tp8", "--reference", "hf", "--num-prompts", "1"], "nothing was compared"),
    ],
)
def test_nothing_compared_is_no_success(tmp_path: Path, argv: list[str], expected: str) -> None:
    model = make_llama(tmp_path / "model", GQA)
    result = CliRunner().invoke(cli.app, ["parity", str(model), "--device", "cpu", *argv])
    assert result.exit_code == 2, result.output
    assert expected in result.output
