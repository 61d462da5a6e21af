"""`sluice check`: what configurations come to, which devices their groups would get, and the commands.

Starts nothing. `missing` and `name_clashes` are also what `sluice serve` can ask before it starts.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from engines import config_devices, registry
from engines.config import ConfigError, ModelConfig, Problem, load
from engines.config_devices import Machine
from gateway.workers import launcher
from gateway.workers.placement import DoesNotFit, GroupPlacement, Placement, place

OK, WRONG_CONFIG, WRONG_MACHINE = 0, 1, 2
_RUN_DIR, _LOG_DIR = Path("RUN_DIR"), Path("LOG_DIR")  # made anew for each start


def run(files: Sequence[Path], gpus: int | None) -> int:
    """Print it all, problems to stderr. `gpus` plans for a machine with that many instead of this one.

    Returns the exit code: 1 for a wrong configuration, 2 for one that the machine cannot run.
    """
    machine = config_devices.this_machine() if gpus is None else Machine(gpus, config_devices.num_cores())
    configs, errors = _load_all(files, machine.num_gpus)
    if errors:
        _print_lines(line for config in configs for line in _describe(config))
        return _fail((str(problem) for error in errors for problem in error.problems), WRONG_CONFIG)
    problems = missing(configs, here=gpus is None)
    try:
        placement = place(configs, machine)
    except DoesNotFit as error:
        _print_lines(line for config in configs for line in _describe(config))
        return _fail([*str(error).split("\n"), *problems], WRONG_MACHINE)
    placed = [group.config for group in placement.groups if group.replica == 0]
    _print_lines(line for config in placed for line in _describe(config))
    _print_lines(_describe_placement(placement, machine))
    return _fail(problems, WRONG_MACHINE) if problems else OK


def missing(configs: Iterable[ModelConfig], *, here: bool) -> list[str]:
    """What the configurations name and this version or, where `here`, this machine does not have."""
    return [problem for config in configs for problem in _missing(config, here)]


def name_clashes(configs: Sequence[ModelConfig]) -> list[Problem]:
    """Names that two configurations both want to serve."""
    first: dict[str, ModelConfig] = {}
    problems = []
    for config in configs:
        for name in dict.fromkeys((config.model_name, *config.served_model_names)):
            other = first.setdefault(name, config)
            if other is not config:
                where = f"{config.source or config.model_path}:1"
                wrong = f"{name!r} is also the name of {other.source or other.model_path}"
                remedy = "give each model its own modelName; for replicas of one model set minWorkers"
                problems.append(Problem(where, "modelName", wrong, remedy=remedy))
    return problems


def _load_all(files: Sequence[Path], num_gpus: int) -> tuple[list[ModelConfig], list[ConfigError]]:
    configs: list[ModelConfig] = []
    errors: list[ConfigError] = []
    for file in files:
        try:
            if file.is_dir():
                configs.append(ModelConfig.for_directory(file, num_gpus=num_gpus))
            else:
                configs.append(load(file, num_gpus=num_gpus))
        except ConfigError as error:
            errors.append(error)
    clashes = name_clashes(configs)
    return configs, [*errors, ConfigError(clashes)] if clashes else errors


def _missing(config: ModelConfig, here: bool) -> Iterator[str]:
    where = config.source or config.model_path
    try:
        registry.check(config.engine)
    except registry.UnknownEngine as error:
        yield f"{where}: {error}"
    if not here:
        return
    if not Path(config.model_path, "config.json").is_file():
        remedy = "set handler.model_path to a local model directory in Hugging Face format"
        yield f"{where}: no model at {config.model_path} (no config.json there); remedy: {remedy}"
    files = (config.chat_template, config.deepspeed.config if config.deepspeed else None)
    for file in filter(None, files):
        if not Path(file).is_file():
            yield f"{where}: {file}: no such file; remedy: correct the path, or put the file there"


def _describe(config: ModelConfig) -> Iterator[str]:
    yield f"{config.source or config.model_path}"
    fields: dict[str, object] = {
        "world_size": config.world_size,
        "devices_per_group": config.devices_per_group,
    }
    fields |= dict(config)
    for name in ("source", "warnings", "is_omp_stated"):
        fields.pop(name)
    for name, value in fields.items():
        yield f"  {name:<24} {_show(value)}"
    for warning in config.warnings:
        yield f"  warning: {warning}"
    yield ""


def _show(value: object) -> str:
    match value:
        case None:
            return "-"
        case bool():
            return str(value).lower()
        case tuple():
            return ", ".join(map(str, value))
    return str(value)


def _describe_placement(placement: Placement, machine: Machine) -> Iterator[str]:
    yield f"devices ({machine.num_gpus} GPUs, {machine.num_cores} cores)"
    for group in placement.groups:
        devices = ", ".join(group.devices) if group.devices else "CPU"
        yield f"  {group.name:<24} {devices}"
    for warning in placement.warnings:
        yield f"  warning: {warning}"
    yield ""
    yield "commands (under python -m engines.guard; RUN_DIR and LOG_DIR are new for each start)"
    for group in placement.groups:
        yield f"  {group.name}"
        yield f"    {_command(group)}"


def _command(group: GroupPlacement) -> str:
    """As one would type it, with what the environment adds."""
    environment = launcher.environment(group.config, group.devices, {})
    settings = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
    return " ".join([*settings, shlex.join(launcher.torchrun_argv(group.config, _RUN_DIR, _LOG_DIR))])


def _print_lines(lines: Iterable[str]) -> None:
    for line in lines:
        print(line)


def _fail(problems: Iterable[str], code: int) -> int:
    for problem in problems:
        print(problem, file=sys.stderr)
    return code
