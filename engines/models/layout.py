"""Whether the files of a model directory are for a group: whole tensors, or a file for each rank. Torch-free.

`check_files` says before a start what `rank_weights.open_weights` and `Checkpoint` say when they load, by the
same functions. Only names of files and manifest.json are looked at.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from engines.base import BadCheckpoint, UnsupportedModel
from engines.models.config import is_llama
from engines.models.manifest import FORMAT, MANIFEST_NAME, Layout, read_manifest

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth")


def layout_of(root: Path) -> Layout | None:
    """How the files are divided over ranks; None where they are not. Raises BadCheckpoint."""
    manifest = read_manifest(root)
    if manifest is None or manifest.format != FORMAT:
        return None
    if manifest.layout is None:
        raise BadCheckpoint(f"{root / MANIFEST_NAME}: layout: missing")
    return manifest.layout


def convert_first(root: Path, *options: str) -> str:
    """The remedy for weights that the server does not read. `options` of the conversion; without, to whole
    safetensors, which every engine and division reads."""
    target = f"{root}-{'sluice' if options else 'hf'}"
    command = shlex.join(["sluice", "convert", str(root), target, *(options or ("--to", "hf"))])
    remedy = f"run `{command}`, and serve {target}"
    if (root / "config.json").is_file() and not is_llama(root):
        remedy = "load it with transformers, and save it as safetensors with save_pretrained"
    return f"{remedy}: the server does not read pickled weights"


def check_whole(root: Path) -> None:
    """Raises BadCheckpoint where there are no safetensors files of whole tensors."""
    if not any((root / name).exists() for name in (INDEX_NAME, SINGLE_NAME)):
        raise no_whole_tensors(root)


def no_whole_tensors(root: Path) -> BadCheckpoint:
    """Says what is there instead, and the remedy."""
    pickled = sorted(path.name for path in root.glob("*") if path.suffix in PICKLE_SUFFIXES)
    if pickled:
        return BadCheckpoint(f"{root / pickled[0]}: {convert_first(root)}")
    if (root / MANIFEST_NAME).exists():
        return BadCheckpoint(
            f"{root}: holds files for ranks, which engines native and pipeline read: "
            f"for another engine, run `sluice convert {root} {root}-hf --to hf`"
        )
    shards = sorted(path.name for path in root.glob("*.safetensors"))
    beside = f" (but {shards[0]})" if shards else ""
    wanted = f"{INDEX_NAME}, and all shards that it names" if shards else "the model's safetensors"
    return BadCheckpoint(
        f"{root}: holds neither {SINGLE_NAME} nor {INDEX_NAME}{beside}: download {wanted}, from where its "
        "config.json is from"
    )


def check_files(root: Path, stages: Sequence[range], tp: int, *, is_cpu: bool, reshard: bool) -> None:
    """Raises BadCheckpoint or UnsupportedModel where a group of these stages, each of `tp` ranks, cannot
    serve the files on such a device. An older GPU that cannot compute with fp8 is found when it loads."""
    layout = layout_of(root)
    if layout is None:
        check_whole(root)
        return
    pp = len(stages)
    if layout.quantization == "fp8" and is_cpu:
        raise no_fp8(root, tp, pp, "a CPU")
    fits = (layout.tp, layout.pp) == (tp, pp)
    fits = fits and all(layout.stages[n] == (s.start, s.stop) for n, s in enumerate(stages))
    if not fits and not reshard:
        raise misfit(root, layout, tp, pp)


def no_fp8(root: Path, tp: int, pp: int, device: str) -> UnsupportedModel:
    """The refusal of fp8 on `device`, which does not compute with it."""
    split = f"--to sluice --tp {tp} --pp {pp}"
    return UnsupportedModel(
        f"{root}: is quantised to fp8, which is served on GPUs of compute capability 8.9 or more, and this "
        f"is {device}: run `sluice convert {root} {root}-bf16 {split} --dtype bfloat16`, or "
        f"`sluice convert SOURCE {root}-int8 {split} --quantize int8` on what it was made of"
    )


def misfit(root: Path, layout: Layout, tp: int, pp: int) -> UnsupportedModel:
    """The refusal of files that are divided otherwise than a group of tp x pp ranks."""
    target = f"{root}-tp{tp}-pp{pp}"
    same = (layout.tp, layout.pp) == (tp, pp)
    how = f"cut into the stages {layout.stages}" if same else f"for tp={layout.tp} pp={layout.pp}"
    counts = [stop - start for start, stop in layout.stages]
    command = f"run `sluice convert {root} {target} --to sluice --tp {tp} --pp {pp}`"
    advice = f"set stageSplit: {counts}" if same else command
    return UnsupportedModel(
        f"{root}: its files are {how}, and the group has tp={tp} pp={pp}: {advice}, "
        "or write reshard: true in model-config.yaml (the one that is served, or a new one in the model's "
        "directory), which divides them anew at each start"
    )
