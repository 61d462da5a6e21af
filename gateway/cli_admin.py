"""`sluice key` and `sluice admin`: keys for a key file, and a running gateway over its unix socket."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NoReturn

import typer

Port = Annotated[
    int, typer.Option(min=0, max=65535, envvar="SLUICE_PORT", help="That the gateway serves on.")
]
LogDir = Annotated[
    Path | None, typer.Option(envvar="SLUICE_LOG_DIR", help="The gateway's; the socket is in there.")
]

admin = typer.Typer(
    help="Look at a running gateway of this user, or steer it, over its unix socket.", no_args_is_help=True
)


def register(app: typer.Typer) -> None:
    app.command()(key)
    app.add_typer(admin, name="admin")


def key(
    name: Annotated[
        str,
        typer.Argument(
            help="What the access log and `sluice admin status` call the key: 1 to 64 of A-Z a-z 0-9 . _ @ -"
        ),
    ],
) -> None:
    """Make an API key: the key on stderr, once; its line for --api-key-file on stdout.

    sluice key alice >> keys.yaml"""
    from gateway import keys

    new = keys.new_key()
    try:
        line = keys.file_line(name, new)
    except keys.BadKeyFile as error:
        _fail(str(error))
    typer.echo(new, err=True)
    typer.echo(line)


@admin.command()
def status(port: Port = 8000, log_dir: LogDir = None) -> None:
    """Models, groups, queues and keys, as JSON."""
    _ask("GET", "/status", port, log_dir)


@admin.command()
def drain(port: Port = 8000, log_dir: LogDir = None) -> None:
    """End as at SIGTERM: what runs may end, nothing new is taken."""
    _ask("POST", "/drain", port, log_dir)


@admin.command()
def restart(
    group: Annotated[str, typer.Argument(help="Such as MODEL/0; `sluice admin status` names them.")],
    port: Port = 8000,
    log_dir: LogDir = None,
) -> None:
    """End a group and start it again; its streams go on."""
    _ask("POST", f"/groups/{group}/restart", port, log_dir)


@admin.command()
def reload_keys(port: Port = 8000, log_dir: LogDir = None) -> None:
    """Read --api-key-file again."""
    _ask("POST", "/reload-keys", port, log_dir)


def _ask(method: str, path: str, port: int, log_dir: Path | None) -> None:
    """Prints the answer as it is."""
    import httpx

    from gateway import serve

    socket = serve.admin_socket(log_dir or serve.default_log_dir(port))
    transport = httpx.HTTPTransport(uds=str(socket))
    try:
        with httpx.Client(transport=transport, base_url="http://admin", timeout=10) as client:
            response = client.request(method, path)
    except httpx.TransportError as error:
        _fail(f"no gateway answers at {socket} ({error}); which one is meant, --port or --log-dir tells")
    if response.is_error:
        _fail(response.json()["error"])
    typer.echo(response.text)


def _fail(message: str) -> NoReturn:
    typer.echo(f"sluice: error: {message}", err=True)
    raise typer.Exit(1)
