"""The command line: `sluice serve | chat | check | convert | bench | ...`. Commands import what they need."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from gateway import cli_admin, cli_conversion

app = typer.Typer(
    name="sluice",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

WRONG, CANNOT = 1, 2
"""Exit codes: what was asked for is wrong; this machine cannot do it."""


class DType(StrEnum):
    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Device(StrEnum):
    CPU = "cpu"
    CUDA = "cuda"


class ToolFormat(StrEnum):
    AUTO = "auto"
    NONE = "none"
    HERMES = "hermes"
    LLAMA_JSON = "llama-json"
    LLAMA_PYTHONIC = "llama-pythonic"
    MISTRAL = "mistral"
    DEEPSEEK_V3 = "deepseek-v3"
    DEEPSEEK_V31 = "deepseek-v3.1"


class ReasoningFormat(StrEnum):
    AUTO = "auto"
    NONE = "none"
    THINK = "think"
    THINKING = "thinking"
    THOUGHT = "thought"
    REASONING = "reasoning"
    SEED = "seed"
    MISTRAL = "mistral"
    COHERE = "cohere"


class LogLevel(StrEnum):
    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class LogFormat(StrEnum):
    TEXT = "text"
    JSON = "json"


def fail(message: str, code: int = WRONG) -> NoReturn:
    """End with the message on stderr, one line a problem, and no traceback."""
    for line in message.splitlines():
        typer.echo(f"sluice: error: {line}", err=True)
    raise typer.Exit(code)


@contextmanager
def clear_errors(*wrong: type[Exception], cannot: type[Exception] | None = None) -> Iterator[None]:
    """What users may have got wrong is said without a traceback; anything else is a bug and shows one."""
    try:
        yield
    except Exception as error:
        if cannot is not None and isinstance(error, cannot):
            fail(str(error), CANNOT)
        if isinstance(error, wrong):
            fail(str(error), WRONG)
        raise


@app.command()
def serve(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL]...",
            envvar="SLUICE_MODELS",
            help="Model directories, hub ids (ORG/NAME[@REVISION]) or model-config.yaml files; "
            "without, the demo model.",
        ),
    ] = None,
    tp: Annotated[
        int | None, typer.Option(min=1, envvar="SLUICE_TP", help="Ranks that share each layer.")
    ] = None,
    pp: Annotated[
        int | None, typer.Option(min=1, envvar="SLUICE_PP", help="Stages that the layers are split into.")
    ] = None,
    replicas: Annotated[
        int | None, typer.Option(min=1, envvar="SLUICE_REPLICAS", help="Worker groups per model.")
    ] = None,
    dtype: Annotated[
        DType | None, typer.Option(envvar="SLUICE_DTYPE", help="Of the weights; auto: as they are stored.")
    ] = None,
    device: Annotated[Device | None, typer.Option(envvar="SLUICE_DEVICE")] = None,
    max_model_len: Annotated[
        int | None,
        typer.Option(min=1, envvar="SLUICE_MAX_MODEL_LEN", help="Tokens of prompt and answer together."),
    ] = None,
    max_num_seqs: Annotated[
        int | None, typer.Option(min=1, envvar="SLUICE_MAX_NUM_SEQS", help="Sequences that run at once.")
    ] = None,
    kv_cache_memory: Annotated[
        str | None,
        typer.Option(envvar="SLUICE_KV_CACHE_MEMORY", help='K/V memory of each rank on CPU, such as "2GiB".'),
    ] = None,
    gpu_memory_share: Annotated[
        float | None,
        typer.Option(min=0, max=1, envvar="SLUICE_GPU_MEMORY_SHARE", help="Of each device's total."),
    ] = None,
    omp_threads: Annotated[
        int | None, typer.Option(min=1, envvar="SLUICE_OMP_THREADS", help="CPU threads of each rank.")
    ] = None,
    served_name: Annotated[
        list[str] | None,
        typer.Option(envvar="SLUICE_SERVED_NAME", help="What clients call the model; may be repeated."),
    ] = None,
    tool_format: Annotated[
        ToolFormat | None,
        typer.Option(
            envvar="SLUICE_TOOL_FORMAT",
            help="How the model writes calls of tools; auto: as its chat template shows.",
        ),
    ] = None,
    reasoning_format: Annotated[
        ReasoningFormat | None,
        typer.Option(
            envvar="SLUICE_REASONING_FORMAT",
            help="The tags of the model's thoughts; auto: those of its chat template.",
        ),
    ] = None,
    host: Annotated[str, typer.Option(envvar="SLUICE_HOST", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, envvar="SLUICE_PORT", help="0: any free one.")
    ] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(envvar="SLUICE_API_KEY", help="A key that clients must send; may be repeated."),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            envvar="SLUICE_API_KEY_FILE",
            help="Keys that clients must send, with names and limits; `sluice key`.",
        ),
    ] = None,
    queue_timeout: Annotated[
        float,
        typer.Option(
            min=0.1, envvar="SLUICE_QUEUE_TIMEOUT", help="Seconds that a request may wait for its turn."
        ),
    ] = 60.0,
    max_body_bytes: Annotated[
        int, typer.Option(min=1, envvar="SLUICE_MAX_BODY_BYTES", help="Of a request; more is refused (413).")
    ] = 16 << 20,
    max_connections: Annotated[
        int,
        typer.Option(min=1, envvar="SLUICE_MAX_CONNECTIONS", help="Open at once; more are refused (503)."),
    ] = 16_384,
    idle_timeout: Annotated[
        float,
        typer.Option(
            min=0.1,
            envvar="SLUICE_IDLE_TIMEOUT",
            help="Seconds that a connection may be open without a request.",
        ),
    ] = 75.0,
    receive_timeout: Annotated[
        float,
        typer.Option(
            min=0.1, envvar="SLUICE_RECEIVE_TIMEOUT", help="Seconds from a request's first byte to its last."
        ),
    ] = 10.0,
    send_timeout: Annotated[
        float,
        typer.Option(
            min=0.1, envvar="SLUICE_SEND_TIMEOUT", help="Seconds that a client may leave an answer unread."
        ),
    ] = 30.0,
    grace: Annotated[
        float,
        typer.Option(min=0, envvar="SLUICE_GRACE", help="Seconds that running requests get at SIGTERM."),
    ] = 30.0,
    recovery_wait: Annotated[
        float,
        typer.Option(
            min=0,
            envvar="SLUICE_RECOVERY_WAIT",
            help="Seconds that a stream waits to go on when its workers have died.",
        ),
    ] = 60.0,
    log_level: Annotated[LogLevel, typer.Option(envvar="SLUICE_LOG_LEVEL")] = LogLevel.INFO,
    log_format: Annotated[LogFormat, typer.Option(envvar="SLUICE_LOG_FORMAT")] = LogFormat.TEXT,
    log_dir: Annotated[
        Path | None, typer.Option(envvar="SLUICE_LOG_DIR", help="Where the ranks' logs go.")
    ] = None,
    access_log: Annotated[
        bool, typer.Option("--access-log", envvar="SLUICE_ACCESS_LOG", help="Log a line for each request.")
    ] = False,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            envvar="SLUICE_CORS_ORIGIN",
            help='Web pages of this origin may ask ("*": of any); may be repeated.',
        ),
    ] = None,
    response_store_bytes: Annotated[
        int,
        typer.Option(
            min=0,
            envvar="SLUICE_RESPONSE_STORE_BYTES",
            help="Memory for responses that previous_response_id may name; 0: none are kept.",
        ),
    ] = 64 << 20,
    page: Annotated[
        bool, typer.Option("--page/--no-page", envvar="SLUICE_PAGE", help="The chat page at /.")
    ] = True,
    replace: Annotated[
        bool,
        typer.Option(
            "--replace",
            envvar="SLUICE_REPLACE",
            help="Once ready, take the port over from the sluice that listens there, which ends what it has.",
        ),
    ] = False,
) -> None:
    """Serve models over HTTP: POST /v1/chat/completions, /v1/completions; GET /v1/models."""
    flags: dict[str, object] = {
        "tp": tp,
        "pp": pp,
        "min_workers": replicas,
        "dtype": dtype and dtype.value,
        "device_type": device and device.value,
        "max_model_len": max_model_len,
        "max_num_seqs": max_num_seqs,
        "kv_cache_memory": kv_cache_memory,
        "gpu_memory_share": gpu_memory_share,
        "torchrun.OMP_NUMBER_THREADS": omp_threads,
        "served_model_names": served_name or None,
        "tool_format": tool_format and tool_format.value,
        "reasoning_format": reasoning_format and reasoning_format.value,
    }
    if served_name and models and len(models) > 1:
        fail("--served-name names one model; with several, write servedModelNames into their YAML files")
    from engines.config import ConfigError
    from gateway import model_source
    from gateway import serve as serving
    from gateway.handover import CannotReplace
    from gateway.listener import CannotListen
    from gateway.workers.placement import DoesNotFit

    options = serving.Options(
        host=host,
        port=port,
        api_keys=tuple(api_key or ()),
        api_key_file=api_key_file,
        queue_timeout=queue_timeout,
        max_body_bytes=max_body_bytes,
        max_connections=max_connections,
        idle_timeout=idle_timeout,
        receive_timeout=receive_timeout,
        send_timeout=send_timeout,
        log_format=log_format.value,
        grace=grace,
        recovery_wait=recovery_wait,
        log_level=log_level.value,
        log_dir=log_dir,
        access_log=access_log,
        page=page,
        cors_origins=tuple(cors_origin or ()),
        response_store_bytes=response_store_bytes,
        replace=replace,
    )
    sources: list[str | None] = [*models] if models else [None]
    wrong = (ConfigError, serving.CannotServe, CannotListen, CannotReplace)
    with clear_errors(*wrong, cannot=DoesNotFit):
        serving.run([model_source.resolve(source, flags) for source in sources], options)


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
    dtype: Annotated[DType, typer.Option(help="In float32 tokens must be identical.")] = DType.FLOAT32,
    device: Annotated[Device | None, typer.Option(help="Default: cuda where there are GPUs.")] = None,
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

    if dtype is DType.AUTO:
        fail("--dtype: name one: what rounding explains depends on it")
    if reference not in (None, comparing.HF):
        fail(f"--reference: is {reference!r}; allowed: hf (or leave it out, and name an engine first)")
    logging.getLogger("gateway.workers").setLevel(logging.CRITICAL)  # the table says what died, and why
    flags = {"dtype": dtype.value, "device_type": device and device.value, "max_model_len": max_model_len}
    wrong = (ConfigError, parity_layouts.BadLayout)
    with clear_errors(*wrong, cannot=comparing.CannotCompare):
        base = model_source.resolve(model, flags)
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
