"""`sluice serve` over fake groups: `python -m tests.fake_group.serve [--spec FILE] SERVE_ARGUMENTS...`

Everything is the real command, its signals and its drain, but for the groups (`--spec` is a FakeSpec as JSON,
read anew at each start; `--real` keeps torchrun's groups) and the back-off: each death of a group counts as
its first, so that a test may kill it as often as it likes and still meets a restart at once.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from engines.config import ModelConfig
from gateway import cli, serve
from gateway.workers import backoff
from gateway.workers.life import GroupSpec
from tests.fake_group.spec import FakeSpec, fake_group


def main() -> None:
    arguments = sys.argv[1:]
    backoff.HEALTHY_SECONDS = 0.0
    if "--real" in arguments:
        arguments.remove("--real")
    else:
        _fake_the_groups(_take_file(arguments))
    sys.argv = ["sluice", "serve", *arguments]
    cli.main()


def _take_file(arguments: list[str]) -> Path | None:
    if "--spec" not in arguments:
        return None
    at = arguments.index("--spec")
    path = Path(arguments[at + 1])
    del arguments[at : at + 2]
    return path


def _specs(file: Path | None) -> Iterator[FakeSpec]:
    while True:
        yield FakeSpec() if file is None else msgspec.json.decode(file.read_bytes(), type=FakeSpec)


def _fake_the_groups(file: Path | None) -> None:
    def group(name: str, config: ModelConfig, devices: Sequence[str]) -> GroupSpec:
        return fake_group(_specs(file), config, name)

    serve.torchrun_group = group  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
