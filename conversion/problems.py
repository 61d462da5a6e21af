"""All that is wrong with the tensors of a checkpoint, not only the first of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from conversion.tensors import LogicalTensor
from engines.base import BadCheckpoint
from engines.models.names import TensorSpec

_FEW = 16  # files that are named one by one
_QUANTIZED = ("I8", "F8_E4M3")


class BadTensors(BadCheckpoint):
    """Tensors that are missing, unknown or of the wrong shape. The message is the first `problem`."""

    def __init__(self, problems: Sequence[str]) -> None:
        more = f" (and {len(problems) - 1} more: sluice inspect lists them)" if len(problems) > 1 else ""
        super().__init__(problems[0] + more)
        self.problems = tuple(problems)


def absent(root: Path, names: Sequence[str], why: str) -> BadCheckpoint:
    """The refusal of a checkpoint that lacks files."""
    listed = ", ".join([str(root / names[0]), *names[1:_FEW]])
    more = f" and {len(names) - _FEW} more" if len(names) > _FEW else ""
    them = "it" if len(names) == 1 else "them"
    return BadCheckpoint(
        f"{listed}{more}: missing: {why}: copy or download {them} from where the others are from"
    )


def collect(
    specs: Iterable[TensorSpec], unknown: Sequence[str], read: Callable[[TensorSpec], LogicalTensor]
) -> tuple[dict[str, LogicalTensor], tuple[str, ...]]:
    """`read` of every tensor that has no problem, by name; `unknown` and what the others raised."""
    problems, tensors = list(unknown), dict[str, LogicalTensor]()
    for spec in specs:
        try:
            tensor = read(spec)
            if tensor.scale is None and tensor.dtype in _QUANTIZED:
                raise BadCheckpoint(
                    f"{tensor.parts[0].path}: tensor {spec.name}: is {tensor.dtype} without scales that are "
                    "known: quantised checkpoints of other tools cannot be converted"
                )
            tensors[spec.name] = tensor
        except BadCheckpoint as error:
            problems.append(str(error))
    return tensors, tuple(problems)
