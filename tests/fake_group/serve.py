"""`sluice serve` over fake groups: `python -m tests.fake_group.serve [--spec JSON] SERVE_ARGUMENTS...`

Everything is the real command, its signals and its drain, but for the groups (`--spec` is a FakeSpec;
`--real` keeps torchrun's) and the back-off: each death of a group counts as its first, so that a test may
kill it as often as it likes and still meets a restart at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

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
        _fake_the_groups(_take_spec(arguments))
    sys.argv = ["sluice", "serve", *arguments]
    cli.main()


def _take_spec(arguments: list[str]) -> FakeSpec:
    if "--spec" not in arguments:
        return FakeSpec()
    at = arguments.index("--spec")
    spec = msgspec.json.decode(arguments[at + 1], type=FakeSpec)
    del arguments[at : at + 2]
    return spec


def _fake_the_groups(spec: FakeSpec) -> None:
    def group(name: str, config: ModelConfig, devices: Sequence[str]) -> GroupSpec:
        return fake_group(spec, config, name)

    serve.torchrun_group = group  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
