"""The DeepSpeed JSON file that `deepspeed.config` names: a key acts, is listed as ignored, or is refused.

It is read twice: with the YAML (`read_deepspeed_file`), and by the engines where they load (`load_settings`),
since it may lie on the machine that serves only. Problems name the file and the line of the key.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from engines.config import DType
from engines.config_errors import A_SLIP, ConfigError, Problem, nearest
from engines.config_read import Settings

_KEY = "deepspeed.config"
MAX_BYTES = 1 << 20
GRAIN_SIZE, MAX_OUT_TOKENS = 64, 1024  # DeepSpeed's defaults

_DTYPES: dict[str, DType] = {
    **dict.fromkeys(("torch.float16", "torch.half", "fp16", "float16", "half"), "float16"),
    **dict.fromkeys(("torch.float32", "torch.float", "fp32", "float32", "float"), "float32"),
    **dict.fromkeys(("torch.bfloat16", "bf16", "bfloat16", "bfloat"), "bfloat16"),
}
_ALIASES = {
    "kernel_inject": "replace_with_kernel_inject",
    "tp": "tensor_parallel",
    "tm": "triangular_masking",
    "max_tokens": "max_out_tokens",
    "min_tokens": "min_out_tokens",
    "injection_dict": "injection_policy",
    "ckpt_config": "checkpoint_config",
    "args": "config",
    "expert_group": "ep_group",
    "expert_mp_group": "ep_mp_group",
}

_WEIGHTS = "weights are read from the model's directory, on each rank only its own"
_NO_MOE = "mixtures of experts are not served through DeepSpeed"
_OBJECT = "it names objects of a Python program, which a JSON file cannot"
IGNORED = {
    "checkpoint": _WEIGHTS,
    "base_dir": _WEIGHTS,
    "checkpoint_config": _WEIGHTS,
    "set_empty_params": _WEIGHTS,
    "save_mp_checkpoint_path": "loading a model writes nothing; `sluice convert` splits checkpoints",
    "replace_method": "DeepSpeed itself no longer reads it",
    "config": "the model's own config.json says what it is",
    "return_tuple": "the engine sets what the model's layers need",
    "min_out_tokens": "maxModelLen bounds a sequence, and what does not fit is refused at once",
    "moe_experts": _NO_MOE,
    "moe_type": _NO_MOE,
    "triton_autotune": "use_triton is not on",
}
REFUSED = {
    "injection_policy": _OBJECT,
    "injection_policy_tuple": _OBJECT,
    "mpu": _OBJECT,
    "ep_group": _OBJECT,
    "ep_mp_group": _OBJECT,
}
FIXED: dict[str, tuple[object, ...]] = {
    "use_triton": (False,),
    "zero": ({},),
    "triangular_masking": (True,),
    "moe": ({}, False),
    "keep_module_on_host": (False,),
    "quant": ({}, {"enabled": False}),
    "training_mp_size": (1,),
    "transposed_mode": (False,),
    "ep_size": (1,),
}
READ = (
    "replace_with_kernel_inject",
    "dtype",
    "tensor_parallel",
    "mp_size",
    "enable_cuda_graph",
    "max_out_tokens",
)
_KNOWN = (*READ, *IGNORED, *REFUSED, *FIXED, *_ALIASES)
_PARALLEL = ("enabled", "tp_size", "tp_grain_size")


@dataclass(frozen=True, slots=True)
class DeepSpeedFile:
    """What the file says that acts. `dtype` None: it names none, and the checkpoint's is served."""

    kernel_inject: bool = False
    dtype: DType | None = None
    tp_grain_size: int = GRAIN_SIZE
    max_out_tokens: int = MAX_OUT_TOKENS
    enable_cuda_graph: bool = False


def read_deepspeed_file(
    s: Settings, path: Path, world_size: int, dtype: str | None = None
) -> DeepSpeedFile | None:
    """Read and check the file against the group's size and the YAML's dtype; what is wrong goes to `s`.
    None where it is wrong or missing: the latter is the machine's matter, of which others tell."""
    if not path.exists():
        return None
    reading = _Reading(path, world_size, dtype)
    found = reading.read()
    for wrong in reading.problems:
        s.problem(
            _KEY,
            f"{wrong.where}: {wrong.wrong}",
            allowed=wrong.allowed,
            near=wrong.nearest,
            remedy=wrong.remedy,
        )
    for warning in reading.warnings:
        s.warn(_KEY, warning)
    return None if reading.problems else found


def load_settings(path: str | Path, world_size: int, dtype: str | None = None) -> DeepSpeedFile:
    """The same where the model is loaded. Raises ConfigError with all problems; the file must be there."""
    reading = _Reading(Path(path), world_size, dtype)
    found = reading.read()
    if reading.problems:
        raise ConfigError(reading.problems)
    return found


@dataclass
class _Reading:
    """One file, and what was found wrong with it. `dtype` is the YAML's; None or "auto" leave it open."""

    path: Path
    world_size: int
    dtype: str | None
    text: str = ""
    content: dict[str, object] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def read(self) -> DeepSpeedFile:
        if not self._parse():
            return DeepSpeedFile()
        self._check_keys()
        parallel = self._parallel()
        self._check_size(parallel)
        inject, graph = self._flag("replace_with_kernel_inject"), self._flag("enable_cuda_graph")
        if graph and self.world_size > 1:
            wrong = f"enable_cuda_graph does not work with {self.world_size} ranks"
            self._problem("enable_cuda_graph", wrong, remedy="set it to false, or parallelLevel to 1")
        if not inject:
            self._warn_of_what_injection_reads(graph)
        return DeepSpeedFile(
            kernel_inject=inject,
            dtype=self._dtype(),
            tp_grain_size=self._count("tp_grain_size", parallel, GRAIN_SIZE),
            max_out_tokens=self._count("max_out_tokens", self.content, MAX_OUT_TOKENS),
            enable_cuda_graph=graph,
        )

    def _parse(self) -> bool:
        remedy = "write a DeepSpeed inference configuration as one JSON object"
        line, wrong = 1, "is not a JSON object"
        try:
            with self.path.open("rb") as file:
                self.text = file.read(MAX_BYTES).decode("utf-8-sig")
            given = json.loads(self.text)
            if isinstance(given, dict):
                self.content = {_ALIASES.get(str(name), str(name)): value for name, value in given.items()}
                self._check_names(given)
                return True
        except json.JSONDecodeError as error:
            line, wrong = error.lineno, f"not valid JSON: {error.msg}"
        except (OSError, ValueError, RecursionError) as error:
            wrong = f"cannot be read: {error}"
        self.problems.append(Problem(f"{self.path}:{line}", "", wrong, remedy=remedy))
        return False

    def _problem(self, key: str, wrong: str, *, allowed: str = "", near: str = "", remedy: str) -> None:
        self.problems.append(Problem(f"{self.path}:{self._line(key)}", "", wrong, allowed, near, remedy))

    def _warn(self, key: str, why: str) -> None:
        self.warnings.append(f"{self.path}:{self._line(key)}: {key} has no effect: {why}")

    def _warn_of_what_injection_reads(self, graph: bool) -> None:
        if "max_out_tokens" in self.content:
            self._warn("max_out_tokens", "AutoTP's K/V is paged; maxModelLen bounds a sequence")
        if graph:
            self._warn("enable_cuda_graph", "AutoTP's steps have many shapes, and no graph is made of them")

    def _line(self, key: str) -> int:
        """Where the key stands, under any of its names."""
        for name in (key, *(alias for alias, meant in _ALIASES.items() if meant == key)):
            match = re.search(rf'"{re.escape(name)}"\s*:', self.text)
            if match:
                return self.text.count("\n", 0, match.start()) + 1
        return 1

    def _check_names(self, given: Mapping[str, object]) -> None:
        for name in given:
            if name not in _KNOWN:
                remedy = f"write {near!r}" if (near := nearest(name, _KNOWN, A_SLIP)) else "remove the key"
                wrong = f"{name} is not a key of DeepSpeed's inference configuration"
                self._problem(name, wrong, near=near, remedy=remedy)
            if name in _ALIASES and _ALIASES[name] in given:
                self._problem(name, f"{name} and {_ALIASES[name]} are one key", remedy="keep one of them")

    def _check_keys(self) -> None:
        for name, value in self.content.items():
            if name in IGNORED:
                self._warn(name, IGNORED[name])
            elif name in REFUSED:
                self._problem(name, f"{name} cannot be used: {REFUSED[name]}", remedy="remove the key")
            elif name in FIXED and value not in FIXED[name]:
                allowed = " or ".join(json.dumps(one) for one in FIXED[name])
                wrong = f"{name} is {json.dumps(value)}, which would change what is served"
                self._problem(name, wrong, allowed=allowed, remedy="remove the key")

    def _parallel(self) -> Mapping[str, object]:
        parallel = self.content.get("tensor_parallel", {})
        if isinstance(parallel, int) and not isinstance(parallel, bool):
            return {"tp_size": parallel}
        if not isinstance(parallel, dict):
            wrong = f"tensor_parallel is {json.dumps(parallel)}"
            self._problem("tensor_parallel", wrong, allowed="an object", remedy='write {"tp_size": 2}')
            return {}
        for name in parallel:
            if name not in _PARALLEL:
                remedy = f"use only {', '.join(_PARALLEL)}"
                self._problem(
                    name, f"tensor_parallel.{name} is unknown", near=nearest(name, _PARALLEL), remedy=remedy
                )
        if parallel.get("enabled", True) is not True and self.world_size > 1:
            wrong = f"tensor_parallel.enabled is off, but the group has {self.world_size} ranks"
            self._problem("enabled", wrong, remedy="set it to true, or parallelLevel to 1")
        return parallel

    def _check_size(self, parallel: Mapping[str, object]) -> None:
        for key, size in _sizes(parallel, self.content):
            if type(size) is not int or size != self.world_size:
                wrong = f"{key} is {size!r}, but the group has {self.world_size} ranks"
                remedy = f"set it to {self.world_size}, or parallelLevel or nproc-per-node to it"
                self._problem(key.rpartition(".")[2], wrong, remedy=remedy)

    def _dtype(self) -> DType | None:
        given = self.content.get("dtype")
        if given is None:
            return None
        dtype = _DTYPES.get(given) if isinstance(given, str) else None
        if dtype is None:
            near = nearest(given, _DTYPES) if isinstance(given, str) else ""
            self._problem(
                "dtype",
                f"dtype is {given!r}",
                allowed=", ".join(_DTYPES),
                near=near,
                remedy="name one of them; quantised weights are not served through DeepSpeed",
            )
        elif self.dtype not in (None, "auto", dtype):
            wrong = f"dtype is {given}, but the YAML's dtype is {self.dtype}"
            self._problem("dtype", wrong, remedy="remove one of them, or make them agree")
        return dtype

    def _flag(self, name: str) -> bool:
        value = self.content.get(name, False)
        if not isinstance(value, bool):
            self._problem(name, f"{name} is {value!r}", allowed="true, false", remedy="correct it")
        return value is True

    def _count(self, name: str, content: Mapping[str, object], default: int) -> int:
        value = content.get(name, default)
        if type(value) is int and value > 0:
            return value
        self._problem(name, f"{name} is {value!r}", allowed="a whole number above 0", remedy="correct it")
        return default


def _sizes(parallel: Mapping[str, object], content: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    if "tp_size" in parallel:
        yield "tensor_parallel.tp_size", parallel["tp_size"]
    if "mp_size" in content:
        yield "mp_size", content["mp_size"]
