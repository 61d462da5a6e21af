"""The small files beside the weights: configuration, index, tokenizer, a model-config.yaml to serve with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from conversion.params import to_params
from conversion.plan import Plan, Target
from conversion.source import Json, Source
from conversion.tensors import TORCH_DTYPES, CannotConvert
from conversion.tokenizer import MadeTokenizer, make_tokenizer
from engines.models.manifest import Layout

_COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "tokenizer.model",
    "README.md",
    "LICENSE",
    "LICENSE.txt",
    "USE_POLICY.md",
)
_MAX_COPIED = 64 << 20


@dataclass(frozen=True, slots=True)
class SideFile:
    """A small file, whole. `config` is set on the one that describes the model."""

    name: str
    content: bytes
    config: Json | None = None

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()


def side_files(source: Source, plan: Plan) -> list[SideFile]:
    """Everything but weights and manifest."""
    made = _tokenizer(source, plan)
    config = _config(source, plan, made)
    copied = {side.name: side for side in _copied(source.root)}
    if made is not None:
        copied |= {side.name: side for side in _made(made)}
    sides = [*_configuration(source, plan, config), *copied.values()]
    if plan.target.format == "sluice":
        assert plan.layout is not None
        text = model_config_yaml(plan.layout)
        sides.append(SideFile("model-config.yaml", text.encode()))
    return sides


def lacks_tokenizer(source: Source, target: Target) -> bool:
    """Whether the result cannot be served for want of a tokenizer.json."""
    names = ("tokenizer.json", "tokenizer.model")
    given = target.tokenizer is not None or any((source.root / name).is_file() for name in names)
    return target.format != "meta" and not given


def _tokenizer(source: Source, plan: Plan) -> MadeTokenizer | None:
    """A tokenizer.json for a source that has Meta's tokenizer.model only. Meta's format keeps that."""
    stated = plan.target.tokenizer
    path = Path(stated) if stated is not None else source.root / "tokenizer.model"
    if stated is not None and plan.target.format == "meta":
        raise CannotConvert(
            "--tokenizer: Meta's format keeps tokenizer.model as it is: put it there yourself"
        )
    if stated is None and ((source.root / "tokenizer.json").exists() or plan.target.format == "meta"):
        return None
    return make_tokenizer(path, source.config) if stated is not None or path.is_file() else None


def _made(made: MadeTokenizer) -> Iterator[SideFile]:
    yield SideFile("tokenizer.json", made.tokenizer_json.encode())
    yield SideFile("tokenizer_config.json", _json(made.tokenizer_config))
    yield SideFile("generation_config.json", _json(made.generation_config))


def _config(source: Source, plan: Plan, made: MadeTokenizer | None) -> Json:
    """config.json of the result: the source's, with what is new in it."""
    config = dict(source.config_json)
    if made is not None:
        config.update(made.generation_config)
    if plan.target.dtype is not None:
        name = str(TORCH_DTYPES[plan.target.dtype]).removeprefix("torch.")
        keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
        config.update(dict.fromkeys(keys, name))
    return config


def _configuration(source: Source, plan: Plan, config: Json) -> Iterator[SideFile]:
    if plan.target.format == "meta":
        assert plan.layout is not None
        params = to_params(source.config, plan.layout.padded_vocab_size)
        yield SideFile("params.json", _json(params), config)
        return
    yield SideFile("config.json", _json(config), config)
    if plan.target.format == "hf" and len(plan.files) > 1:
        weight_map = {entry.name: file.name for file in plan.files for entry in file.entries}
        index = {"metadata": {"total_size": plan.num_bytes}, "weight_map": weight_map}
        yield SideFile("model.safetensors.index.json", _json(index))


def _copied(root: Path) -> Iterator[SideFile]:
    for name in _COPIED:
        path = root / name
        if not path.is_file():
            continue
        if path.stat().st_size > _MAX_COPIED:
            raise CannotConvert(f"{path}: is {path.stat().st_size} bytes, no file of that name is so large")
        yield SideFile(name, path.read_bytes())


def _json(value: Json) -> bytes:
    return json.dumps(value, indent=2).encode() + b"\n"


def model_config_yaml(layout: Layout | None, path: str = ".") -> str:
    """A model-config.yaml that serves such a layout; None: the files of a whole model."""
    tp, pp = (1, 1) if layout is None else (layout.tp, layout.pp)
    lines = [f"modelPath: {path}"]
    if layout is None or tp * pp == 1:
        return "\n".join([*lines, "parallelType: tp", "parallelLevel: 1", ""])
    kind = "pptp" if tp > 1 and pp > 1 else "pp" if pp > 1 else "tp"
    lines += [f"parallelType: {kind}", f"parallelLevel: {tp * pp}"]
    if kind == "pptp":
        lines += [f"tensorParallel: {tp}", f"pipelineParallel: {pp}"]
    if pp > 1:
        lines += [f"stageSplit: {[stop - start for start, stop in layout.stages]}"]
    return "\n".join([*lines, ""])
