"""`sluice check`: what configurations come to, which devices their groups would get, and the commands.

Starts nothing. `name_clashes` and `fit` are also what `sluice serve` asks before it starts anything.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from engines import config_devices, modelfit, registry
from engines.config import ConfigError, ModelConfig, Problem, load
from engines.config_devices import Machine
from engines.modeldir import BadModelDir
from gateway.check_show import describe, describe_placement
from gateway.workers.placement import DoesNotFit, Placement, place

OK, WRONG_CONFIG, WRONG_MACHINE = 0, 1, 2
_PACKAGES = {"accelerate": "accelerate", "deepspeed_tp": "deepspeed", "deepspeed_inject": "deepspeed"}
_UNSEEN = "not checked with --gpus: model directories, other files and packages that this machine lacks"


def run(files: Sequence[Path], gpus: int | None) -> int:
    """Print it all, problems to stderr. `gpus` plans for a machine with that many instead of this one.

    Returns the exit code: 1 for a wrong configuration, 2 for one that the machine cannot run.
    """
    is_here = gpus is None
    machine = config_devices.this_machine() if gpus is None else Machine(gpus, config_devices.num_cores())
    configs, errors = _load_all(files, machine.num_gpus)
    configs = [modelfit.with_fallback(config) for config in configs]
    if errors:
        _print_lines(line for config in configs for line in describe(config))
        wrong = [str(problem) for error in errors for problem in error.problems]
        return _fail([*wrong, *missing(configs, here=is_here)], WRONG_CONFIG)
    try:
        placement = fit(configs, machine, here=is_here)
    except DoesNotFit as error:
        _print_lines(line for config in configs for line in describe(config))
        return _fail(str(error).split("\n"), WRONG_MACHINE)
    placed = [group.config for group in placement.groups if group.replica == 0]
    _print_lines(line for config in placed for line in describe(config))
    _print_lines(describe_placement(placement, machine))
    _print_lines([] if is_here else ["", _UNSEEN])
    return OK


def fit(configs: Sequence[ModelConfig], machine: Machine, *, here: bool = True) -> Placement:
    """Where the groups go on the machine. `here`: it is this one, which has the models and packages.

    Raises DoesNotFit with a line for everything that the machine, or a model, cannot do."""
    problems = missing(configs, here=here)
    try:
        placement = place(configs, machine)
    except DoesNotFit as error:
        raise DoesNotFit("\n".join([*str(error).split("\n"), *problems])) from None
    if problems:
        raise DoesNotFit("\n".join(problems))
    return placement


def missing(configs: Iterable[ModelConfig], *, here: bool) -> list[str]:
    """What the configurations name and this version or, where `here`, this machine does not have, and what
    their models cannot do."""
    return [problem for config in configs for problem in _missing(config, here)]


def name_clashes(configs: Sequence[ModelConfig]) -> list[Problem]:
    """Models given twice, and names that two configurations both want to serve."""
    first: dict[str, ModelConfig] = {}
    problems: list[Problem] = []
    for config in configs:
        names = dict.fromkeys((config.model_name, *config.served_model_names))
        others = [(name, first.setdefault(name, config)) for name in names]
        clashes = [(name, other) for name, other in others if other is not config]
        twice = any(_where(other) == _where(config) for _, other in clashes)
        problems += [_given_twice(config)] if twice else [_clash(config, *clash) for clash in clashes]
    return problems


def _given_twice(config: ModelConfig) -> Problem:
    remedy = "give it once; for replicas of one model set minWorkers (--replicas)"
    return Problem(_where(config), "", "is given twice", remedy=remedy)


def _clash(config: ModelConfig, name: str, other: ModelConfig) -> Problem:
    where = f"{config.source}:1" if config.source else config.model_path
    wrong = f"{name!r} is also the name of {_where(other)}"
    remedy = "give each model its own modelName in its model-config.yaml"
    return Problem(where, "modelName", wrong, remedy=remedy)


def _where(config: ModelConfig) -> str:
    return config.source or config.model_path


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
    try:
        registry.check(config.engine)
    except registry.UnknownEngine as error:
        yield f"{config.place('engine') or _where(config)}: {error}"
    if here:
        for keys, problem in _missing_here(config):
            yield f"{config.place(*keys) or _where(config)}: {problem}"
    if Path(config.model_path, "config.json").is_file():
        try:
            yield from modelfit.misfits(config)
        except BadModelDir as error:
            yield f"{_where(config)}: {error}"


_ENGINE_KEYS = ("engine", "deepspeed", "parallelType")


def _missing_here(config: ModelConfig) -> Iterator[tuple[tuple[str, ...], str]]:
    """What is not there, after the keys of which one asks for it."""
    package = _PACKAGES.get(config.engine)
    if package is not None and find_spec(package) is None:
        remedy = f"in Sluice's directory, pip install -e '.[{package}]'"
        wrong = f"engine {config.engine} needs the package {package}, which is not installed"
        yield _ENGINE_KEYS, f"{wrong}; remedy: {remedy}"
    if not Path(config.model_path, "config.json").is_file():
        yield modelfit.MODEL_KEYS, modelfit.no_model(config)
    files = (
        (("chatTemplate", "handler.chat_template"), config.chat_template, ""),
        (("deepspeed.config",), config.deepspeed.config if config.deepspeed else None, _DEEPSPEED_FILE),
    )
    for keys, file, what_for in files:
        if file and not Path(file).is_file():
            yield keys, f"{file}: no such file{what_for}; remedy: correct the path, or put the file there"


_DEEPSPEED_FILE = "; which engine serves, whether its tp_size is that of the group, and dtype depend on it"


def _print_lines(lines: Iterable[str]) -> None:
    for line in lines:
        print(line)


def _fail(problems: Iterable[str], code: int) -> int:
    for problem in problems:
        print(problem, file=sys.stderr)
    return code
