"""The commands on checkpoints: `sluice convert | inspect | verify`. The work is in the package conversion,
which is imported by name when a command runs: it needs torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer


class To(StrEnum):
    HF = "hf"
    META = "meta"
    SLUICE = "sluice"


class StoredDType(StrEnum):
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Quantize(StrEnum):
    INT8 = "int8"
    FP8 = "fp8"


class Embedding(StrEnum):
    ROWS = "rows"
    COLUMNS = "columns"


_SHORT = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}

RopeTheta = Annotated[float | None, typer.Option(min=0, help="Where Meta's params.json has none.")]
RopeFactor = Annotated[
    float | None, typer.Option(min=0, help="llama3 scaling of a Meta model that is not a released one.")
]
MaxPositions = Annotated[int | None, typer.Option(min=1, help="max_position_embeddings of a Meta model.")]
AllowExtra = Annotated[bool, typer.Option("--allow-extra", help="Leave unknown tensors out.")]


def _fail(lines: Iterable[str], code: int = 1) -> NoReturn:
    for line in lines:
        typer.echo(f"sluice: error: {line}", err=True)
    raise typer.Exit(code)


@contextmanager
def _clear_errors(as_json: bool = False) -> Iterator[Any]:
    """Gives conversion.main. Its errors end the command with a line and exit code 1, Ctrl-C with 130;
    `as_json`: an event."""
    try:
        main = import_module("conversion.main")
        try:
            yield main
        except main.USER_ERRORS as error:
            if as_json:
                main.say_error(error)
            _fail(str(error).splitlines(), main.exit_code(error))
    except KeyboardInterrupt:
        _fail(["interrupted, and nothing was written"], 130)


def _choices(*values: object) -> Any:
    return import_module("conversion.source").Choices(*values)


def convert(
    src: Annotated[Path, typer.Argument(help="A directory: Hugging Face's, Meta's, or per-rank files.")],
    dst: Annotated[Path, typer.Argument(help="A directory that is not there yet.")],
    to: Annotated[To, typer.Option(help="hf: safetensors; meta: .pth; sluice: a file for each rank.")],
    tp: Annotated[
        int | None, typer.Option(min=1, help="Ranks that share each layer (sluice), or as --shards (meta).")
    ] = None,
    pp: Annotated[
        int | None, typer.Option(min=1, help="Stages that the layers are split into (sluice).")
    ] = None,
    stage_split: Annotated[
        str | None,
        typer.Option(help="How stages divide the layers (sluice): as stageSplit in model-config.yaml."),
    ] = None,
    shards: Annotated[int | None, typer.Option(min=1, help="Model-parallel shards (meta).")] = None,
    embedding: Annotated[
        Embedding | None, typer.Option(help="How shards split it: Llama 3 rows, Llama 1 and 2 columns.")
    ] = None,
    dtype: Annotated[StoredDType | None, typer.Option(help="Default: as it is.")] = None,
    quantize: Annotated[Quantize | None, typer.Option(help="Weights of the layers (sluice).")] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="A tokenizer.model that does not lie beside the weights.")
    ] = None,
    max_file_size: Annotated[
        str | None, typer.Option(help="Of Hugging Face's files; default 5GiB.", show_default=False)
    ] = None,
    max_memory: Annotated[str, typer.Option(help="Buffers, beyond the interpreter itself.")] = "512MiB",
    jobs: Annotated[int, typer.Option(min=0, help="Files written at once; 0: one a core.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where one was interrupted.")] = False,
    check_source: Annotated[
        bool | None,
        typer.Option(
            "--check-source/--no-check-source",
            help="First read it all, and compare it with its checksums. Default: where it has some.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show files and sizes, write nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Log JSON lines.")] = False,
    rope_theta: RopeTheta = None,
    rope_scaling_factor: RopeFactor = None,
    max_positions: MaxPositions = None,
    allow_extra: AllowExtra = False,
) -> None:
    """Convert a checkpoint to another format or layout, streaming; a killed run leaves no half result."""
    with _clear_errors(as_json) as main:
        only_for = {
            "--tp": (tp, (To.SLUICE, To.META)),
            "--pp": (pp, (To.SLUICE,)),
            "--stage-split": (stage_split, (To.SLUICE,)),
            "--quantize": (quantize, (To.SLUICE,)),
            "--shards": (shards, (To.META,)),
            "--embedding": (embedding, (To.META,)),
            "--max-file-size": (max_file_size, (To.HF,)),
        }
        for option, (value, formats) in only_for.items():
            if value is not None and to not in formats:
                allowed = " and ".join(f"--to {one.value}" for one in formats)
                raise main.CannotConvert(f"{option}: is for {allowed}: leave it out with --to {to.value}")
        if to is To.META and tp is not None and shards not in (None, tp):
            raise main.CannotConvert(
                f"--tp {tp}: means as many shards, and --shards says {shards}: remove one"
            )
        target = main.Target(
            to.value,
            shards=shards or tp or 1,
            tp=tp or 1,
            pp=pp or 1,
            dtype=dtype and _SHORT[dtype.value],
            embedding_by_rows=None if embedding is None else embedding is Embedding.ROWS,
            max_file_bytes=main.parse_bytes(max_file_size or "5GiB"),
            quantize=quantize and quantize.value,
            stage_split=main.parse_stage_split(stage_split or "work"),
            tokenizer=tokenizer and str(tokenizer),
        )
        options = main.Options(main.parse_bytes(max_memory), jobs, resume)
        choices = _choices(rope_theta, rope_scaling_factor, max_positions, allow_extra)
        main.convert(src, dst, target, choices, options, dry_run=dry_run, as_json=as_json, check=check_source)


def inspect(
    directory: Annotated[Path, typer.Argument()],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    rope_theta: RopeTheta = None,
    rope_scaling_factor: RopeFactor = None,
    max_positions: MaxPositions = None,
    allow_extra: AllowExtra = False,
) -> None:
    """Show what a checkpoint is: family, sizes, layout, which tp and pp fit, a model-config.yaml."""
    with _clear_errors(as_json) as main:
        choices = _choices(rope_theta, rope_scaling_factor, max_positions, allow_extra)
        problems = main.inspect(directory, choices, as_json=as_json)
    if problems:
        _fail(problems)


def verify(
    first: Annotated[Path, typer.Argument(metavar="A")],
    second: Annotated[
        Path | None, typer.Argument(metavar="[B]", help="Without it: A against its manifest.")
    ] = None,
    numeric: Annotated[bool, typer.Option(help="Run some layers of both, and compare logits.")] = True,
    layers: Annotated[int, typer.Option(min=1, help="Of the numeric check.")] = 2,
    rope_theta: RopeTheta = None,
    rope_scaling_factor: RopeFactor = None,
    max_positions: MaxPositions = None,
    allow_extra: AllowExtra = False,
) -> None:
    """Compare two checkpoints of any layouts, tensor by tensor. Exit code 1: they differ, a quantised one
    by more than quantising loses."""
    with _clear_errors() as main:
        choices = _choices(rope_theta, rope_scaling_factor, max_positions, allow_extra)
        raise typer.Exit(min(1, main.verify(first, second, choices, numeric=numeric, layers=layers)))


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    for command in (convert, inspect, verify):
        app.command()(command)
