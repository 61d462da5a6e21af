"""The command line: `sluice serve | chat | check | convert | bench | ...`. Commands import what they need."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

from gateway import cli_admin, cli_conversion, flags
from gateway.logs import LogFormat, last_words
from gateway.options import ModelFlags, Options
from gateway.settings import Settings

app = typer.Typer(
    name="sluice",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

WRONG, CANNOT = 1, 2
"""Exit codes: what was asked for is wrong; this machine cannot do it."""


def fail(message: str, code: int = WRONG, log_format: LogFormat = "text") -> NoReturn:
    """End with the message on stderr, one line a problem, and no traceback."""
    for line in message.splitlines():
        typer.echo(last_words(line, log_format), err=True)
    raise typer.Exit(code)


@contextmanager
def clear_errors(
    *wrong: type[Exception], cannot: type[Exception] | None = None, log_format: LogFormat = "text"
) -> Iterator[None]:
    """What users may have got wrong is said without a traceback; anything else is a bug and shows one."""
    try:
        yield
    except Exception as error:
        if cannot is not None and isinstance(error, cannot):
            fail(str(error), CANNOT, log_format)
        if isinstance(error, wrong):
            fail(str(error), WRONG, log_format)
        raise


def serve(models: list[str] | None = None, **given: Any) -> None:
    """Serve models over HTTP, with OpenAI's API and Anthropic's."""
    from engines.config import ConfigError
    from gateway import model_source
    from gateway import serve as serving
    from gateway.handover import CannotReplace
    from gateway.listener import CannotListen
    from gateway.workers.placement import DoesNotFit

    of_models = ModelFlags(**flags.given_to(ModelFlags, given))
    if of_models.served_names and models and len(models) > 1:
        fail("--served-name names one model; with several, write servedModelNames into their YAML files")
    with clear_errors(ValueError):
        options = Options(**flags.given_to(Options, given))
    sources: list[str | None] = [*models] if models else [None]
    wrong = (ConfigError, serving.CannotServe, CannotListen, CannotReplace)
    with clear_errors(*wrong, cannot=DoesNotFit, log_format=options.log_format):
        configs = [model_source.resolve(source, of_models.as_config()) for source in sources]
        serving.run(configs, options)


def _add_serve() -> None:
    """Its options are the fields of what it fills in."""
    models = typer.Argument(
        metavar="[MODEL]...",
        envvar="SLUICE_MODELS",
        help="Model directories, hub ids (ORG/NAME[@REVISION]) or model-config.yaml files; "
        "without, the demo model.",
    )
    positional = inspect.Parameter(
        "models",
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        default=None,
        annotation=Annotated[list[str] | None, models],
    )
    options = flags.parameters(ModelFlags, Options, Settings)
    serve.__signature__ = inspect.Signature([positional, *options])  # type: ignore[attr-defined]
    app.command()(serve)


_add_serve()


@app.command()
def check(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="model-config.yaml files.")],
    gpus: Annotated[
        int | None, typer.Option(min=0, help="Plan for a machine with this many GPUs, not for this one.")
    ] = None,
) -> None:
    """Show what configurations come to: resolved values, devices, the exact torchrun command. Runs nothing.

    Exit code 1: a configuration is wrong; 2: this machine (or --gpus) cannot run it."""
    from gateway import check as checking

    raise typer.Exit(checking.run(files, gpus))


@app.command()
def chat(
    url: Annotated[
        str, typer.Option(envvar="SLUICE_URL", help="Any OpenAI-compatible server.")
    ] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="Default: the first that the server lists.")] = None,
    system: Annotated[str | None, typer.Option(help="Instructions for the model.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1)] = None,
    temperature: Annotated[float | None, typer.Option(min=0)] = None,
    api_key: Annotated[str | None, typer.Option(envvar=["SLUICE_API_KEY", "OPENAI_API_KEY"])] = None,
) -> None:
    """Chat in the terminal with a model that is being served.

    Questions may be piped in, one a line; exit code 1: one was not answered."""
    import readline  # noqa: F401  input() gets line editing and history
    import sys

    from gateway import api_client
    from gateway import chat as chatting

    def say(text: str) -> None:
        typer.echo(text, nl=False)

    def complain(text: str) -> None:
        typer.echo(text, nl=False, err=True)

    is_terminal = sys.stdin.isatty()
    with clear_errors(api_client.ServerError), api_client.connect(url, api_key) as client:
        name = api_client.choose_model(client, model)
        if is_terminal:
            say(f"{name} at {client.base_url}. {chatting.HELP}\n")
        conversation = chatting.Conversation(client, name, max_tokens, temperature, system)
        num_failed = chatting.talk(conversation, lambda: input("> " if is_terminal else ""), say, complain)
    if num_failed and not is_terminal:
        raise typer.Exit(WRONG)


class Endpoint(StrEnum):
    COMPLETIONS = "completions"
    CHAT = "chat"


class PromptKind(StrEnum):
    IDS = "ids"
    TEXT = "text"


@app.command()
def bench(
    model: Annotated[str | None, typer.Option(help="Default: the first that the server lists.")] = None,
    url: Annotated[
        str, typer.Option(envvar="SLUICE_URL", help="Any OpenAI-compatible server.")
    ] = "http://127.0.0.1:8000",
    endpoint: Annotated[Endpoint, typer.Option()] = Endpoint.COMPLETIONS,
    concurrency: Annotated[str, typer.Option(help="Requests at once; several are run in turn.")] = "1,8,32",
    num_requests: Annotated[
        int | None, typer.Option(min=1, help="Per concurrency; default: 4 times it, 8 at least.")
    ] = None,
    prompt_kind: Annotated[
        PromptKind | None, typer.Option(help="ids: token ids (completions only); text: words.")
    ] = None,
    prompt_len: Annotated[int, typer.Option(min=1, help="Tokens.")] = 128,
    output_len: Annotated[int, typer.Option(min=1, help="Tokens.")] = 64,
    vocab_size: Annotated[int, typer.Option(min=17, help="Token ids are drawn from 16 up to it.")] = 1024,
    tokenizer: Annotated[
        str | None, typer.Option(help="A tokenizer.json: text prompts then have exactly --prompt-len tokens.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0)] = 0.0,
    ignore_eos: Annotated[
        bool, typer.Option(help="Ask for the whole length; an extra that some servers refuse.")
    ] = True,
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 0,
    warmup: Annotated[int, typer.Option(min=0, help="Requests before the first that counts.")] = 1,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds without a byte.")] = 300.0,
    api_key: Annotated[str | None, typer.Option(envvar=["SLUICE_API_KEY", "OPENAI_API_KEY"])] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here as well.")] = None,
) -> None:
    """Measure a server: time to first token, time between tokens, output tokens a second."""
    import asyncio

    from rich.console import Console

    from gateway import api_client
    from gateway import bench as benching
    from gateway.sse_client import BenchError

    kind = prompt_kind or (PromptKind.TEXT if endpoint is Endpoint.CHAT else PromptKind.IDS)
    with clear_errors(BenchError, api_client.ServerError):
        levels = benching.parse_concurrencies(concurrency)
        with api_client.connect(url, api_key) as client:
            name = api_client.choose_model(client, model)
    config = benching.BenchConfig(
        url=url,
        model=name,
        endpoint=endpoint.value,
        prompt_kind=kind.value,
        prompt_len=prompt_len,
        output_len=output_len,
        vocab_size=vocab_size,
        tokenizer=tokenizer,
        temperature=temperature,
        ignore_eos=ignore_eos,
        seed=seed,
        api_key=api_key,
        timeout=timeout,
    )
    with clear_errors(BenchError):
        results = asyncio.run(benching.run(config, levels, num_requests, warmup))
    if json_file is not None:
        json_file.write_text(benching.to_json(config, results))
    console = Console()
    console.print(benching.table(config, results, console.width))
    for result in results:
        if result.first_error is not None:
            where = f"at concurrency {result.concurrency}"
            fail(
                f"{result.num_failed} of {result.num_requests} requests failed {where}: {result.first_error}"
            )


@app.command()
def parity(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="As for `sluice serve`; default: the demo model.")
    ] = None,
    engines: Annotated[
        str,
        typer.Option(help="ENGINE or ENGINE:tpNppN, with commas; default: all. The first is compared with."),
    ] = "",
    reference: Annotated[
        str | None, typer.Option(help="hf: compare with transformers' generate instead of the first engine.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="A prompt a line: text, or a JSON list of token ids. Default: random.")
    ] = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="Random prompts.")] = 32,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens that each engine goes on with.")] = 32,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="In float32 tokens must be identical.")
    ] = "float32",
    device: Annotated[
        Literal["cpu", "cuda"] | None, typer.Option(help="Default: cuda where there are GPUs.")
    ] = None,
    max_model_len: Annotated[int | None, typer.Option(min=1)] = None,
    seed: Annotated[int, typer.Option(help="Of the random prompts.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here as well.")] = None,
) -> None:
    """Serve the same weights through each engine and layout that fits, and compare tokens and scores.

    Exit code 0: something was compared, and all of it is identical, or, in other dtypes than float32, differs
    as rounding explains (numerics); 1: it is not, or an engine died; 2: nothing could be compared.
    Engines that refuse the model are listed, and do not count."""
    import asyncio
    import logging

    from rich.console import Console

    from engines.config import ConfigError
    from gateway import model_source, parity_layouts
    from gateway import parity as comparing

    if reference not in (None, comparing.HF):
        fail(f"--reference: is {reference!r}; allowed: hf (or leave it out, and name an engine first)")
    logging.getLogger("gateway.workers").setLevel(logging.CRITICAL)  # the table says what died, and why
    chosen = {"dtype": dtype, "device_type": device, "max_model_len": max_model_len}
    wrong = (ConfigError, parity_layouts.BadLayout)
    with clear_errors(*wrong, cannot=comparing.CannotCompare):
        base = model_source.resolve(model, chosen)
        names = [name.strip() for name in engines.split(",") if name.strip()]
        options = comparing.Options(
            layouts=parity_layouts.choose(names),
            reference=reference,
            prompts=comparing.read_prompts(prompts, base) if prompts else None,
            num_prompts=num_prompts,
            max_tokens=max_tokens,
            seed=seed,
        )
        result = asyncio.run(comparing.run(base, options, lambda line: typer.echo(line, err=True)))
    if json_file is not None:
        json_file.write_text(comparing.to_json(result))
    comparing.show(result, Console())
    for note in comparing.notes(result):
        typer.echo(note)
    if result.is_wrong:
        raise typer.Exit(WRONG)
    if result.is_empty:
        fail("nothing was compared", CANNOT)


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        from importlib.metadata import version as version_of

        typer.echo(f"sluice {version_of('sluice')}")
        raise typer.Exit


@app.callback()
def sluice(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """Serve language models that are split over several processes or GPUs, behind OpenAI's API."""


@app.command()
def version() -> None:
    """Print the versions of Sluice and of what decides its speed."""
    import platform
    from importlib.metadata import version as version_of

    names = ("sluice", "torch", "transformers", "tokenizers", "fastapi", "uvicorn")
    typer.echo(
        "  ".join([*(f"{name} {version_of(name)}" for name in names), f"python {platform.python_version()}"])
    )


cli_conversion.register(app)
cli_admin.register(app)


def main() -> None:
    """The `sluice` command."""
    app()
