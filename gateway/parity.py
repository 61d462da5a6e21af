"""`sluice parity MODEL`: the same weights through every engine and layout that fits, compared token by token.

Groups are started one after another by the supervisor that serves them otherwise, and asked over the same
socket: what is compared is what clients would get.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from engines import config_devices, modelfit
from engines.config import ModelConfig
from engines.wire import Generate, SamplingParams, TokenDelta, TokenLogprob
from gateway.parity_compare import NUM_TOP, Answer, Comparison, Verdict, compare
from gateway.parity_layouts import Layout
from gateway.workers.group import Group
from gateway.workers.placement import place
from gateway.workers.protocol import GroupState, WorkerLost, WorkerUnavailable
from gateway.workers.supervisor import Supervisor, torchrun_group

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

HF = "hf"
_GREEDY = SamplingParams(temperature=0.0)
_LOOK_SECONDS, _SETTLE_SECONDS = 0.05, 3.0
_NEVER = 3600.0  # seconds to a restart: a group that dies here stays dead
_FIRST_ID = 2  # of random prompts: 0 and 1 are often special tokens

Say = Callable[[str], None]


class CannotCompare(ValueError):  # noqa: N818
    """There is nothing to compare with, or no prompt to compare on. Says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """`prompts` None: `num_prompts` random ones. `reference`: a layout's name, or "hf"."""

    layouts: Sequence[Layout]
    reference: str | None = None
    prompts: Sequence[Sequence[int]] | None = None
    num_prompts: int = 32
    max_tokens: int = 32
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Result:
    reference: str
    dtype: str
    comparisons: Sequence[Comparison]

    @property
    def is_wrong(self) -> bool:
        """An engine that was to serve died, or gave what its dtype does not excuse."""
        return any(
            one.verdict is Verdict.FAILED
            or (one.verdict.is_compared and not one.verdict.is_good_in(self.dtype))
            for one in self.comparisons
        )

    @property
    def is_empty(self) -> bool:
        return not any(one.verdict.is_compared for one in self.comparisons)


class _NotServed(Exception):  # noqa: N818
    def __init__(self, verdict: Verdict, reason: str) -> None:
        super().__init__(reason)
        self.verdict = verdict


class _Served:
    """A ready group, asked for as many sequences at a time as it takes: it refuses more."""

    def __init__(self, group: Group) -> None:
        assert group.info is not None, "it is ready"
        self._group = group
        self._places = asyncio.Semaphore(group.info.max_num_seqs + group.config.job_queue_size)

    async def deltas(self, request: Generate) -> list[TokenDelta]:
        async with self._places:
            deltas = [delta async for batch in self._group.generate(request) for delta in batch]
        for delta in deltas:
            if delta.error is not None:
                raise _NotServed(Verdict.FAILED, f"a request failed: {delta.error.message}")
        return deltas


async def run(base: ModelConfig, options: Options, say: Say) -> Result:
    """Compare; `say` gets a line a step. Raises CannotCompare when the reference itself cannot be had."""
    layouts = list(options.layouts)
    prompts = [list(prompt) for prompt in options.prompts or _random_prompts(base, options)]
    if options.reference == HF:
        name = "transformers generate"
        say(f"{name}: reference")
        reference = await _ask_transformers(base, prompts, options.max_tokens)
    else:
        first = layouts.pop(0)
        name = str(first)
        if not layouts:
            raise CannotCompare(f"there is only {name}: name a second engine, or write --reference hf")
        say(f"{name}: reference")
        try:
            reference = await _ask(first, base, prompts, options.max_tokens, None)
        except _NotServed as error:
            raise CannotCompare(f"the reference {name} cannot serve this model: {error}") from None
    dtype = _dtype(base)
    comparisons = []
    for layout in layouts:
        say(f"{layout}: starting")
        comparison = await _compare(layout, base, prompts, reference, options.max_tokens, dtype)
        say(f"{layout}: {comparison.verdict} ({comparison.seconds:.0f} s) {comparison.reason}".rstrip())
        comparisons.append(comparison)
    return Result(name, dtype, comparisons)


async def _compare(
    layout: Layout,
    base: ModelConfig,
    prompts: Sequence[list[int]],
    reference: Sequence[Answer],
    max_tokens: int,
    dtype: str,
) -> Comparison:
    started = time.monotonic()
    try:
        answers = await _ask(layout, base, prompts, max_tokens, [answer.token_ids for answer in reference])
    except _NotServed as error:
        return Comparison(name=str(layout), verdict=error.verdict, reason=str(error))
    comparison = compare(str(layout), reference, answers, dtype)
    return msgspec.structs.replace(comparison, seconds=time.monotonic() - started)


async def _ask(
    layout: Layout,
    base: ModelConfig,
    prompts: Sequence[list[int]],
    max_tokens: int,
    forced: Sequence[list[int]] | None,
) -> list[Answer]:
    """Batches mix, as they do when serving. `forced` None: its own tokens are forced."""
    async with _serving(layout, base) as group:
        try:
            own = await asyncio.gather(
                *(_tokens(group, f"free{i}", p, max_tokens) for i, p in enumerate(prompts))
            )
            scored = await asyncio.gather(
                *(
                    _scores(group, f"forced{i}", prompt, tokens)
                    for i, (prompt, tokens) in enumerate(zip(prompts, forced or own, strict=True))
                )
            )
        except (WorkerLost, WorkerUnavailable, TimeoutError) as error:
            raise _NotServed(Verdict.FAILED, str(error) or type(error).__name__) from None
    return [
        Answer(tokens, [score.logprob for score in scores], [score.top for score in scores])
        for tokens, scores in zip(own, scored, strict=True)
    ]


@asynccontextmanager
async def _serving(layout: Layout, base: ModelConfig) -> AsyncIterator[_Served]:
    """The group once it is ready. Raises _NotServed."""
    machine = config_devices.this_machine()
    if reason := layout.why_not_here(base.device, machine.num_gpus):
        raise _NotServed(Verdict.SKIPPED, reason)
    (placed,) = place([layout.config_from(base, machine.num_cores)], machine).groups
    spec = torchrun_group(placed.name, placed.config, placed.devices)
    with tempfile.TemporaryDirectory(prefix="sluice-parity-") as logs:
        supervisor = Supervisor([spec], Path(logs), grace_seconds=0.1, backoff_seconds=lambda _: _NEVER)
        async with supervisor:
            (group,) = supervisor.groups
            while group.state is GroupState.STARTING:
                await asyncio.sleep(_LOOK_SECONDS)
            if group.state is not GroupState.READY:
                raise await _why_not(group)
            yield _Served(group)


async def _why_not(group: Group) -> _NotServed:
    """A refusal is what a restart would meet again: the supervisor soon says so, by FAILED."""
    deadline = time.monotonic() + _SETTLE_SECONDS
    while group.state is not GroupState.FAILED and time.monotonic() < deadline:
        await asyncio.sleep(_LOOK_SECONDS)
    kind = Verdict.REFUSED if group.state is GroupState.FAILED else Verdict.FAILED
    return _NotServed(kind, group.failure or "it did not start")


async def _tokens(group: _Served, id: str, prompt: list[int], max_tokens: int) -> list[int]:
    request = Generate(id=id, prompt_ids=prompt, max_tokens=max_tokens, ignore_eos=True, sampling=_GREEDY)
    return [token for delta in await group.deltas(request) for token in delta.token_ids]


async def _scores(group: _Served, id: str, prompt: list[int], tokens: list[int]) -> list[TokenLogprob]:
    """How the engine scores each of `tokens` after `prompt` and those before it."""
    request = Generate(
        id=id,
        prompt_ids=prompt + tokens,
        max_tokens=1,
        ignore_eos=True,
        sampling=_GREEDY,
        prompt_logprobs=NUM_TOP,
    )
    found = [score for delta in await group.deltas(request) for score in delta.prompt_logprobs]
    if not found:
        raise _NotServed(Verdict.FAILED, "it gave no log-probabilities of the prompt")
    return [score for score in found[len(prompt) :] if score is not None]


async def _ask_transformers(base: ModelConfig, prompts: Sequence[list[int]], max_tokens: int) -> list[Answer]:
    """transformers' own `generate`, in a process of its own: the gateway imports neither it nor torch."""
    argv = [sys.executable, "-m", "engines.hf_reference", base.model_path, _dtype(base), base.device]
    child = await asyncio.create_subprocess_exec(
        *argv,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    question = json.dumps({"prompts": prompts, "max_tokens": max_tokens, "num_top": NUM_TOP}).encode()
    try:
        out, errors = await child.communicate(question)
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    if child.returncode:
        lines = errors.decode(errors="replace").strip().splitlines() or ["it said nothing"]
        raise CannotCompare(f"the reference transformers ended with {child.returncode}: {lines[-1]}")
    return msgspec.json.decode(out, type=list[Answer])


def _dtype(base: ModelConfig) -> str:
    assert base.dtype != "auto", "the command line always names one"
    return base.dtype


def _random_prompts(base: ModelConfig, options: Options) -> list[list[int]]:
    """Of 1 to 100 ids; every third begins like the one before it, so that prefixes are shared."""
    vocab, longest = _limits(base)
    longest = min(100, longest - options.max_tokens)
    if longest < 1:
        raise CannotCompare(f"the model has no room for a prompt and {options.max_tokens} tokens")
    rng = random.Random(options.seed)
    made: list[list[int]] = []
    for number in range(options.num_prompts):
        ids = [rng.randrange(_FIRST_ID, vocab) for _ in range(rng.randint(1, longest))]
        made.append([*made[-1][:48], *ids][:longest] if number % 3 == 2 else ids)
    return made


def _limits(base: ModelConfig) -> tuple[int, int]:
    """The model's vocabulary, and its positions."""
    path = Path(base.model_path) / "config.json"
    if not path.is_file():
        raise CannotCompare(modelfit.no_model(base))
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        vocab, positions = int(config["vocab_size"]), int(config["max_position_embeddings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CannotCompare(f"{path}: cannot be read: {error}") from None
    return vocab, min(positions, base.max_model_len or positions)


def read_prompts(path: Path, base: ModelConfig) -> list[list[int]]:
    """A prompt a line: text, or a JSON list of token ids. Raises CannotCompare naming the line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise CannotCompare(f"{path}: cannot be read: {error}") from None
    prompts = [
        _prompt(f"{path}:{number}", line, base) for number, line in enumerate(lines, 1) if line.strip()
    ]
    if not prompts:
        raise CannotCompare(f"{path}: holds no prompt")
    return prompts


def _prompt(where: str, line: str, base: ModelConfig) -> list[int]:
    if line.lstrip().startswith("["):
        try:
            return msgspec.json.decode(line, type=list[int])
        except msgspec.DecodeError as error:
            raise CannotCompare(f"{where}: not a list of token ids: {error}") from None
    from gateway.prompt.tokenizer import Tokenizer

    file = Path(base.model_path) / "tokenizer.json"
    if not file.exists():
        raise CannotCompare(f"{where}: is text, and {file} does not exist: write token ids, as [1, 2, 3]")
    return Tokenizer(file).encode(line, add_special_tokens=True)


def show(result: Result, console: Console) -> None:
    """Print the table: within a terminal's width, else as wide as it is; and what its columns mean."""
    if not console.is_terminal:
        console.width = _WIDEST
    console.print(table(result))
    console.print(_FORCED, highlight=False, soft_wrap=True)


_WIDEST = 1000
_FORCED = (
    "equal tokens: of its own continuations, each up to its first difference; "
    "forced: places where, given the reference's tokens so far, its likeliest token is the reference's"
)


def table(result: Result) -> Table:
    """For the terminal. What was not compared has its reason in `notes`."""
    from rich.table import Table

    shown = Table(title=f"reference: {result.reference}, {result.dtype}", title_justify="left")
    for title in ("engine", "verdict"):
        shown.add_column(title, no_wrap=True)
    for title in ("equal tokens", "forced", "first difference", f"max |dlogprob|, top {NUM_TOP}"):
        shown.add_column(title, overflow="fold")
    for one in result.comparisons:
        if not one.num_tokens:
            shown.add_row(one.name, one.verdict)
            continue
        first = one.first
        where = f"prompt {first.prompt}, token {first.position}, margin {first.margin:.2g}" if first else ""
        counts = (f"{one.num_equal}/{one.num_tokens}", f"{one.num_forced_equal}/{one.num_tokens}")
        shown.add_row(one.name, one.verdict, *counts, where, f"{one.max_top_logprob_difference:.1e}")
    return shown


def notes(result: Result) -> list[str]:
    """Why engines were not compared, and what a verdict comes to in this dtype; a line each."""
    return [
        f"{one.name}: {one.verdict}: {reason}"
        for one in result.comparisons
        if (reason := one.reason or _complaint(one, result.dtype))
    ]


def _complaint(one: Comparison, dtype: str) -> str:
    excused = one.verdict is not Verdict.NUMERICS or one.verdict.is_good_in(dtype)
    return "" if excused else f"in {dtype} every token must be the same"


def to_json(result: Result) -> str:
    """Everything that the table shows and more, indented."""
    content = {
        "reference": result.reference,
        "dtype": result.dtype,
        "num_top": NUM_TOP,
        "comparisons": msgspec.to_builtins(result.comparisons),
    }
    return json.dumps(content, indent=2) + "\n"
