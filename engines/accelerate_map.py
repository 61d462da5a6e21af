"""The accelerate engine: a Hugging Face model in one process, its layers placed by Accelerate's device map.

Layers compute one after another, wherever their weights are: on several devices, or brought there from
main memory or disk for each step. The K/V of a layer is kept where the layer computes. What lies on disk is
read from the checkpoint itself: nothing is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from engines.base import Batch, ReportProgress, UnsupportedModel
from engines.models import hf
from engines.models.checkpoint import Checkpoint
from engines.models.hf_inspect import inspect_model
from engines.runtime.mesh import Mesh

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from engines.config import ModelConfig

DeviceMap = dict[str, int | str]
"""Module names (prefixes; "" is the whole model) to "cpu", "disk" or a CUDA device's number."""

_KV_SHARE = 0.25
"""Of a CUDA device's share of memory, left for K/V and activations where maxMemory does not say."""


class AccelerateEngine(hf.PagedEngine):
    """Implements engines.base.Engine."""

    def __init__(self, config: ModelConfig, mesh: Mesh, report: ReportProgress) -> None:
        if mesh.world_size != 1:
            raise UnsupportedModel(
                "engine accelerate is one process for all its devices: write parallelType: custom"
            )
        if find_spec("accelerate") is None:
            raise UnsupportedModel(
                "engine accelerate needs the package accelerate: "
                "in Sluice's directory, pip install -e '.[accelerate]'"
            )
        self._found = inspect_model(config.model_path, config.max_model_len)
        checkpoint = hf.open_checkpoint(self._found)
        self._dtype = hf.dtype_of(self._found, checkpoint, config.dtype)
        self.model = hf.build_empty(self._found, self._dtype)
        device_map = place(self.model, config)
        hf.fill(self.model, checkpoint, lambda name: _home(device_map, name), report)
        _dispatch(self.model, device_map, checkpoint)
        self._decoder = hf.HFDecoder(self.model, self._found.shape.attention_names)
        self._num_kv_heads = self._found.shape.num_kv_heads
        homes = set(device_map.values())
        self._input_device = _torch_device(homes.pop()) if len(homes) == 1 else mesh.device
        if set(device_map.values()) == {"cpu"}:
            hf.pack_linears(self.model)

    def forward(self, batch: Batch) -> Tensor:
        """[T, H] on the batch's device, wherever the last layer computed."""
        device = self._input_device
        hidden = self._decoder.forward(batch.input_ids.to(device), batch.positions.to(device))
        return hidden.to(batch.input_ids.device)

    def logits(self, hidden: Tensor) -> Tensor:
        return self._decoder.logits(hidden.to(self._input_device)).to(hidden.device)


def place(model: PreTrainedModel, config: ModelConfig) -> DeviceMap:
    """Which module goes where: as the configuration says, or worked out from what the devices hold.

    Raises UnsupportedModel where a given map leaves parameters out, names modules that are not there, or
    the model does not fit.
    """
    if not isinstance(config.device_map, str):
        return _given(model, {name: _device(text) for name, text in config.device_map})
    if config.device == "cpu" and not config.max_memory:
        return {"": "cpu"}
    from accelerate import infer_auto_device_map  # type: ignore[import-untyped]

    unsplit = list(model._no_split_modules or ())
    limits = _limits(model, config, unsplit)
    return dict(infer_auto_device_map(model, limits, unsplit, dtype=model.dtype))


def _limits(model: PreTrainedModel, config: ModelConfig, unsplit: list[str]) -> dict[int | str, int | str]:
    """Bytes that each device may hold of the weights."""
    from accelerate.utils import get_balanced_memory, get_max_memory  # type: ignore[import-untyped]

    limits: dict[int | str, int | str] = {_device(name): size for name, size in config.max_memory}
    for device in limits:
        _check_present("maxMemory", device)
    if config.device == "cuda":
        for number in range(torch.cuda.device_count()):
            total = torch.cuda.get_device_properties(number).total_memory
            limits.setdefault(number, int(total * config.gpu_memory_share * (1 - _KV_SHARE)))
    limits.setdefault("cpu", get_max_memory()["cpu"])
    if config.device_map == "sequential" or config.device == "cpu":
        return limits
    low_zero = config.device_map == "balanced_low_0"
    balanced: dict[int | str, int | str] = get_balanced_memory(
        model, limits, unsplit, dtype=model.dtype, low_zero=low_zero
    )
    return balanced


def _device(text: str) -> int | str:
    """As Accelerate names devices."""
    return int(text.removeprefix("cuda:")) if text.startswith("cuda:") else text


def _check_present(key: str, device: int | str) -> None:
    count = torch.cuda.device_count()
    if isinstance(device, int) and device >= count:
        raise UnsupportedModel(
            f"{key}: cuda:{device} is not there: this process sees {count} CUDA devices, counted from "
            "cuda:0; name one of them, or raise parallelLevel"
        )


def _given(model: PreTrainedModel, device_map: DeviceMap) -> DeviceMap:
    modules = dict(model.named_modules())
    for name, device in device_map.items():
        if name and name not in modules:
            raise UnsupportedModel(
                f"deviceMap: {name}: the model has no such module; it has {', '.join(_top(modules))}: "
                "correct the name, or remove the entry"
            )
        _check_present("deviceMap", device)
    for name, _ in model.named_parameters():
        if _lookup(device_map, name) is None:
            raise UnsupportedModel(
                f"deviceMap: {name}: no entry covers it; add one for it, or '' for all the rest"
            )
    return dict(_spread(model, "", device_map, None))


def _spread(
    module: torch.nn.Module, name: str, device_map: DeviceMap, inherited: int | str | None
) -> Iterator[tuple[str, int | str]]:
    """The map with entries inside of others resolved: Accelerate takes disjoint ones only."""
    device = device_map.get(name, inherited)
    prefix = f"{name}." if name else ""
    if not any(key != name and key.startswith(prefix) for key in device_map):
        if device is not None:
            yield name, device
        return
    for child_name, child in module.named_children():
        yield from _spread(child, prefix + child_name, device_map, device)


def _top(modules: dict[str, torch.nn.Module]) -> list[str]:
    """Names that a device map may use, down to a layer."""
    return [name for name in modules if name and name.count(".") <= 1 and not name.endswith(".layers")] + [
        name for name in modules if name.count(".") == 2 and name.rpartition(".")[2] == "0"
    ]


def _lookup(device_map: DeviceMap, name: str) -> int | str | None:
    """The device of a parameter: that of its longest prefix in the map."""
    prefix = name
    while prefix:
        if prefix in device_map:
            return device_map[prefix]
        prefix = prefix.rpartition(".")[0]
    return device_map.get("")


def _home(device_map: DeviceMap, name: str) -> torch.device | None:
    """Where a parameter is kept. None: on disk, where it is already."""
    device = _lookup(device_map, name)
    assert device is not None, name
    return None if device == "disk" else _torch_device(device)


def _torch_device(device: int | str) -> torch.device:
    """Where a module on `device` computes; from disk it is brought to the main memory at least."""
    if isinstance(device, int):
        return torch.device("cuda", device)
    return torch.device("cpu")


def _dispatch(model: PreTrainedModel, device_map: DeviceMap, checkpoint: Checkpoint) -> None:
    """Have the layers' inputs, and weights that are elsewhere, brought to where they compute."""
    devices = set(device_map.values())
    if devices == {"cpu"}:
        return
    from accelerate import dispatch_model

    dispatch_model(
        model,
        device_map,
        offload_index=_on_disk(model, device_map, checkpoint) if "disk" in devices else None,
        skip_keys=model._skip_keys_device_placement,
    )


def _on_disk(
    model: PreTrainedModel, device_map: DeviceMap, checkpoint: Checkpoint
) -> dict[str, dict[str, str]]:
    """Accelerate's index of offloaded weights, pointing into the checkpoint's own files."""
    index = {}
    for name, _ in model.named_parameters(remove_duplicate=False):
        if _lookup(device_map, name) == "disk":
            source = model.all_tied_weights_keys.get(name, name)
            index[name] = {
                "safetensors_file": str(checkpoint.tensors[source].path),
                "weight_name": checkpoint.tensors[source].name,
                "dtype": str(model.dtype).removeprefix("torch."),
            }
    return index
