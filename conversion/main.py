"""The commands `convert`, `inspect` and `verify`, without their flags: called by the command line."""

from __future__ import annotations

import json
import math
import re
import shlex
import time
from pathlib import Path
from typing import cast

from conversion.inspect import describe, ready_config
from conversion.job import Interrupted, Options, check_start, run
from conversion.open import examine, open_checkpoint
from conversion.plan import Plan, Target, make_plan
from conversion.problems import BadTensors
from conversion.progress import shown
from conversion.sidecar import lacks_tokenizer
from conversion.sizes import shown_bytes, shown_speed
from conversion.source import Choices, Source
from conversion.tensors import CannotConvert
from conversion.verify import check_source, differences, summary
from engines.base import BadCheckpoint, UnsupportedModel
from engines.config import StageSplit
from engines.modeldir import BadModelDir
from engines.models.manifest import Manifest

USER_ERRORS = (CannotConvert, BadCheckpoint, UnsupportedModel, BadModelDir)
"""What these functions raise for what is wrong with a checkpoint or a request; the message says it all."""

INTERRUPTED = 130
"""The exit code after Ctrl-C, as shells have it."""

_UNITS = {"": 1, "k": 10, "m": 20, "g": 30, "t": 40}


def parse_bytes(text: str) -> int:
    """512M, 1GiB, 4096. Raises CannotConvert."""
    match = re.fullmatch(r"(\d+)\s*([kmgt]?)i?b?", text.strip().lower())
    if match is None:
        raise CannotConvert(f"{text!r} is not a size: write 512M, 2GiB, or bytes")
    shift = _UNITS[match[2]]
    return int(match[1]) if shift == 1 else int(match[1]) << shift


def parse_stage_split(text: str) -> StageSplit:
    """work, layers, bytes, or the layers of each stage, as in 10,11,11. Raises CannotConvert."""
    if text in ("work", "layers", "bytes"):
        return cast(StageSplit, text)
    if re.fullmatch(r"\d+(,\d+)*", text) is None:
        raise CannotConvert(f"--stage-split {text!r}: write work, layers, bytes, or layers such as 10,11,11")
    return tuple(int(count) for count in text.split(","))


def convert(
    source_dir: Path,
    target_dir: Path,
    target: Target,
    choices: Choices,
    options: Options,
    *,
    dry_run: bool,
    as_json: bool,
    check: bool | None = None,
) -> None:
    """Raises USER_ERRORS. `check`: hash the source first; None: as far as it says what it should be."""
    source = open_checkpoint(source_dir, choices)
    plan = make_plan(source, target)
    _show_notes(source, as_json)
    _show_tokenizer(source, target, as_json)
    if dry_run:
        _show_plan(plan, target_dir, as_json)
    check_start(source, plan, target_dir)  # before checksums, which may take long
    if dry_run:
        return
    if check is not False:
        _check(source, options, must=bool(check), as_json=as_json)
    start = time.perf_counter()
    with shown(plan.num_bytes, as_json) as progress:
        manifest = run(source, plan, target_dir, options, progress)
    seconds = time.perf_counter() - start
    _show_result(plan, manifest, target_dir, seconds, is_resumed=options.resume, as_json=as_json)


def _check(source: Source, options: Options, *, must: bool, as_json: bool) -> None:
    checked = check_source(source, options.jobs)
    if must and not checked:
        raise CannotConvert(f"--check-source: nothing says what the files of {source.root} should be")
    if as_json:
        _say("checked", by=checked or None)
    else:
        print(f"  checked: {checked or 'headers only: there are no checksums to compare the values with'}")


def _show_notes(source: Source, as_json: bool) -> None:
    if as_json:
        _say("source", path=str(source.root), **_about(source))
        return
    print(f"{source.root}: {source.format}, {source.layout}")
    for note in source.notes:
        print(f"  concluded: {note}")
    if source.ignored:
        print(f"  left out: {', '.join(source.ignored)}")


def _show_tokenizer(source: Source, target: Target, as_json: bool) -> None:
    """Before the work, where there is none."""
    if not lacks_tokenizer(source, target):
        return
    if as_json:
        _say("warning", message=f"{source.root}: {_NO_TOKENIZER}")
    else:
        print(f"  warning: {_NO_TOKENIZER}")


_NO_TOKENIZER = (
    "there is neither tokenizer.json nor tokenizer.model, without which the result cannot be served: put one "
    "beside the weights first, or name a tokenizer.model with --tokenizer"
)


def _about(source: Source) -> dict[str, object]:
    opened = {"format": source.format, "layout": source.layout}
    return {**opened, "concluded": source.notes, "left_out": source.ignored}


def _say(event: str, **what: object) -> None:
    """A line of the JSON log."""
    print(json.dumps({"event": event, **what}), flush=True)


def exit_code(error: Exception) -> int:
    """Of a command that fails with one of USER_ERRORS."""
    return INTERRUPTED if isinstance(error, Interrupted) else 1


def say_error(error: Exception) -> None:
    """The last line of the JSON log of a command that fails with one of USER_ERRORS."""
    problems = error.problems if isinstance(error, BadTensors) else [str(error)]
    _say("error", message=str(error), problems=problems, exit_code=exit_code(error))


def _show_plan(plan: Plan, target: Path, as_json: bool) -> None:
    if as_json:
        files = {file.name: file.num_bytes for file in plan.files}
        _say("plan", files=files, bytes=plan.num_bytes)
        return
    for file in plan.files:
        print(f"  {file.num_bytes:>16,} bytes  {len(file.entries):>5} tensors  {target / file.name}")
    print(f"  {plan.num_bytes:>16,} bytes  in all ({shown_bytes(plan.num_bytes)})")


def _show_result(
    plan: Plan, manifest: Manifest, target: Path, seconds: float, *, is_resumed: bool, as_json: bool
) -> None:
    """`is_resumed`: the time is not that of all bytes."""
    odd = [
        f"{file}: {name}"
        for file, written in manifest.files.items()
        for name, tensor in written.tensors.items()
        if not tensor.is_finite
    ]
    if as_json:
        lost = {name: error for error, name in _errors(manifest)}
        _say(
            "done", bytes=plan.num_bytes, seconds=round(seconds, 3), not_finite=odd, quantization_errors=lost
        )
        return
    for name in odd:
        print(f"  warning: {name}: has values that are infinite or not numbers")
    _show_errors(manifest)
    speed = f" in {seconds:.1f} s, {shown_speed(plan.num_bytes, seconds)}"
    print(f"{target}: {shown_bytes(plan.num_bytes)}{'' if is_resumed else speed}")
    if "tokenizer.json" in manifest.files and manifest.format != "meta":
        is_fp8 = plan.layout is not None and plan.layout.quantization == "fp8"
        where = " --device cuda" if is_fp8 else ""  # CPUs refuse it
        print(f"serve it with: sluice serve {shlex.quote(str(target))}{where}")


def _errors(manifest: Manifest) -> list[tuple[float, str]]:
    """What quantisation lost of each tensor, the worst first."""
    errors = [
        (tensor.error, f"{file}: {name}")
        for file, written in manifest.files.items()
        for name, tensor in written.tensors.items()
        if tensor.error is not None
    ]
    return sorted(errors, reverse=True)


def _show_errors(manifest: Manifest) -> None:
    errors = _errors(manifest)
    if errors:
        mean = sum(error for error, _ in errors) / len(errors)
        print(f"  quantised: relative error {mean:.3%} in the mean of {len(errors)} tensors; the largest:")
    for error, name in errors[:3]:
        print(f"    {error:.3%}  {name}")


def inspect(directory: Path, choices: Choices, *, as_json: bool) -> tuple[str, ...]:
    """Shows what is known. Returns a line for each tensor that is missing, unknown or oddly shaped; as JSON
    they are shown too. Raises USER_ERRORS."""
    source = examine(directory, choices)
    ready = None if source.problems else ready_config(source, choices)
    if as_json:
        described = dict(describe(source))
        described.pop("note", None)
        found = {"notes": source.notes, "problems": source.problems, "model-config.yaml": ready}
        print(json.dumps(described | found))
        return source.problems
    for label, value in describe(source):
        print(f"{label:>14}  {value}")
    if ready is not None:
        print(f"\nmodel-config.yaml:\n{ready}", end="")
    return source.problems


def verify(first_dir: Path, second_dir: Path | None, choices: Choices, *, numeric: bool, layers: int) -> int:
    """The number of differences, each printed. Raises USER_ERRORS.

    A quantised side may differ by what quantising loses: no difference, and told in the last line."""
    first = open_checkpoint(first_dir, choices)
    second = None if second_dir is None else open_checkpoint(second_dir, choices)
    num_differences = 0
    checked = {source.root: check_source(source) for source in (first, second) if source is not None}
    for root, what in checked.items():
        print(f"{root}: {what}" if what else f"{root}: no checksums to compare its files with")
    if second is None and not checked[first.root]:
        raise CannotConvert(f"{first_dir}: cannot be verified alone: name a second checkpoint")
    if second is None:
        return 0
    found = []
    for difference in differences(first, second):
        found.append(difference)
        if difference.loss is None:
            print(f"differs: {difference.what}: {difference.why}", flush=True)
            num_differences += 1
    if numeric:
        num_differences += _numeric_differences(first, second, layers)
    print(summary(first, second, found))
    return num_differences


_PROGRAMS = {"hf": "Hugging Face's transformers", "meta": "Meta's arithmetic"}


def _numeric_differences(first: Source, second: Source, layers: int) -> int:
    """Each against the first by transformers, a Meta checkpoint by Meta's arithmetic besides. Printed."""
    from conversion.numeric import arithmetics, logits

    expected = logits(first, layers, "hf")
    scale, num_differences = float(expected.abs().max()), 0
    others = [(source, by) for source in (first, second) for by in arithmetics(source)]
    for source, by in others:
        if source is first and by == "hf":
            continue
        largest = float((logits(source, layers, by) - expected).abs().max())
        is_lossy = (source.quantization or first.quantization) is not None
        allowed = math.inf if is_lossy else 1e-4 * max(scale, 1.0)
        equal = largest <= allowed  # not where one is not a number
        num_differences += not equal
        verdict = "differs: logits" if not equal else "quantised" if is_lossy else "agree"
        print(
            f"{verdict}: {layers} layers in float32 differ by {largest:.2g} at most, "
            f"logits are up to {scale:.3g}: {source.root} by {_PROGRAMS[by]}"
        )
    return num_differences
