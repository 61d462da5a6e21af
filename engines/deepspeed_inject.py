"""The deepspeed_inject engine: DeepSpeed's injected inference kernels, which keep their own K/V (CUDA only).

What the kernels cannot do is refused before weights are read, with the remedy (`check_support`): their K/V is
one workspace for the process, as large as the first batch; the rows of a batch have one length; a forward
pass over one token a row is taken for a decoding step, whatever came before.

A rank never has the whole model in main memory: a layer's weights are read when DeepSpeed comes to it, which
copies its slice of them to the device, and go with the layer that was exchanged. DeepSpeed's own way (layers
without memory, and a list of checkpoint files) reads every file whole on every rank.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from engines.base import Batch, ReportProgress, UnsupportedModel
from engines.config_deepspeed import DeepSpeedFile
from engines.models import deepspeed_comm, hf
from engines.models.checkpoint import Checkpoint
from engines.models.hf_inspect import inspect_model
from engines.models.injection import AUTOTP, check_support, settings_of, why_autotp
from engines.runtime.mesh import Mesh

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from engines.config import ModelConfig

log = logging.getLogger("sluice.deepspeed")


class Injected(Protocol):
    """A model whose layers were exchanged for kernels. Tests have one of their own with the same limits."""

    model: PreTrainedModel

    def reset(self) -> None:
        """Forget the K/V of the batch before."""


class DeepSpeedInjectEngine:
    """Implements engines.base.Engine. Batches come whole from the static scheduler: rows of one length."""

    batching: ClassVar[Literal["continuous", "static"]] = "static"
    min_prompt_len: ClassVar[int] = 2
    """A prompt of one token would be taken for a decoding step of the batch before."""

    def __init__(self, config: ModelConfig, mesh: Mesh, report: ReportProgress) -> None:
        self._settings = settings_of(config)
        check_support(config, self._settings)
        deepspeed_comm.require_deepspeed()
        self._mesh, self._num_rows = mesh, config.batch_size
        self._found = inspect_model(config.model_path, config.max_model_len)
        checkpoint = hf.open_checkpoint(self._found)
        self.dtype = hf.dtype_of(self._found, checkpoint, self._settings.dtype or config.dtype)
        model = hf.build_empty(self._found, self.dtype)
        self._injected = inject(
            model, self._settings, mesh, fill_layer_by_layer(model, checkpoint, report), report
        )
        self._decoder = hf.HFDecoder(self._injected.model, ())

    @classmethod
    def instead(cls, config: ModelConfig) -> str | None:
        """The engine that serves where this one cannot and the user allowed it (`deepspeed.fallback`)."""
        refusal = why_autotp(config, settings_of(config))
        if refusal is None:
            return None
        log.warning("AutoTP serves instead of kernel injection: %s", refusal)
        return "deepspeed_tp"

    @property
    def kv_spec(self) -> None:
        """The kernels keep it."""
        return None

    @property
    def vocab_size(self) -> int:
        return self._found.shape.vocab_size

    @property
    def max_model_len(self) -> int:
        return min(self._found.shape.max_positions, self._settings.max_out_tokens)

    @property
    def plans_in_flight(self) -> int:
        return 1

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Tensor:
        """[T, H]. A batch's first pass has its whole prompts; every later one, a token a row."""
        rows, length = batch.num_seqs, batch.max_query_len
        assert rows * length == batch.num_tokens, "rows of a static batch have one length"
        if length > 1:
            self._injected.reset()
        base: Any = self._injected.model.base_model
        hidden: Tensor = base(
            input_ids=self._filled(batch.input_ids.view(rows, length)),
            position_ids=self._filled(batch.positions.view(rows, length)),
            use_cache=False,
        ).last_hidden_state
        return hidden[:rows].reshape(batch.num_tokens, -1)

    def _filled(self, rows: Tensor) -> Tensor:
        """[S, L] to [batch_size, L], the first row repeated: the workspace always sees one batch size."""
        missing = self._num_rows - rows.shape[0]
        return torch.cat([rows, rows[:1].expand(missing, -1)]) if missing else rows

    def logits(self, hidden: Tensor) -> Tensor | None:
        logits = self._decoder.logits(hidden)
        return logits if self._mesh.is_leader else None


FillLayer = Callable[[nn.Module], None]
"""Reads the weights of one layer of the model into main memory."""


def fill_layer_by_layer(model: PreTrainedModel, checkpoint: Checkpoint, report: ReportProgress) -> FillLayer:
    """Read what is in no layer at once, and each layer's weights when the function that is returned is called
    with it. Raises BadCheckpoint, as does that function."""
    layers: Any = model.base_model.layers
    of_layers = f"{model.base_model_prefix}.layers."
    prefixes = {layer: f"{of_layers}{number}." for number, layer in enumerate(layers)}
    num_layers, cpu = len(layers), torch.device("cpu")

    def fill(is_wanted: Callable[[str], bool]) -> None:
        hf.fill(model, checkpoint, lambda name: cpu if is_wanted(name) else None, lambda *_: None)

    def fill_layer(layer: nn.Module) -> None:
        prefix = prefixes.pop(layer)  # and forget it: its weights shall go with it
        fill(lambda name: name.startswith(prefix))
        report(1 - len(prefixes) / num_layers)

    fill(lambda name: not name.startswith(of_layers))
    return fill_layer


class _DeepSpeedInjected:
    """The real kernels."""

    def __init__(self, model: PreTrainedModel, layer: type[nn.Module]) -> None:
        self.model = model
        self._layer: Any = layer

    def reset(self) -> None:
        self._layer.reset_cache()


def inject(
    model: PreTrainedModel,
    settings: DeepSpeedFile,
    mesh: Mesh,
    fill_layer: FillLayer,
    report: ReportProgress,
) -> Injected:
    """Exchange the layers of a model for kernels, compiled when first used. Raises UnsupportedModel."""
    deepspeed = deepspeed_comm.connect(mesh, report)
    from deepspeed.model_implementations.transformers.ds_transformer import (  # type: ignore[import-untyped]
        DeepSpeedTransformerInference,
    )

    _compile(deepspeed, report)
    with _filled_when_exchanged(fill_layer):
        deepspeed.init_inference(
            model,
            dtype=model.dtype,
            replace_with_kernel_inject=True,
            tensor_parallel=deepspeed_comm.tensor_parallel(mesh),
            max_out_tokens=settings.max_out_tokens,
            return_tuple=False,  # the layers of transformers 5 return a tensor
        )
    return _DeepSpeedInjected(model, DeepSpeedTransformerInference)


@contextmanager
def _filled_when_exchanged(fill_layer: FillLayer) -> Iterator[None]:
    """DeepSpeed makes a policy for a layer, and by it reads the layer's weights: they are there by then."""
    from deepspeed.module_inject import replace_module  # type: ignore[import-untyped]
    from deepspeed.module_inject.containers.llama import LLAMALayerPolicy  # type: ignore[import-untyped]

    make = LLAMALayerPolicy.__init__

    def fill_and_make(policy: Any, layer: nn.Module | None, inference: bool = True) -> None:
        if layer is not None:  # None: it only asks for the class of the layers
            fill_layer(layer)
        make(policy, layer, inference)

    LLAMALayerPolicy.__init__ = fill_and_make
    try:
        yield
    finally:
        LLAMALayerPolicy.__init__ = make
        replace_module.container_g = None  # the first layer, kept for reading checkpoints DeepSpeed's way


def _compile(deepspeed: ModuleType, report: ReportProgress) -> None:
    """Compile the kernels, unless that was done. Raises UnsupportedModel where they cannot be."""
    _require_compilers()
    try:
        deepspeed_comm.build(deepspeed, deepspeed_comm.KERNELS, report)
    except Exception as error:  # whatever compilers and loaders raise
        log.exception("DeepSpeed's kernels could not be compiled")
        raise UnsupportedModel(
            f"DeepSpeed's kernels could not be compiled ({type(error).__name__}; the worker's log has the "
            f"compiler's words): mend that, or {AUTOTP}"
        ) from error


def _require_compilers() -> None:
    """Raises UnsupportedModel where the kernels would have to be compiled and cannot."""
    from deepspeed.git_version_info import installed_ops  # type: ignore[import-untyped]
    from torch.utils.cpp_extension import CUDA_HOME

    if installed_ops.get("transformer_inference"):
        return
    missing = [tool for tool in ("g++", "ninja") if shutil.which(tool) is None]
    if CUDA_HOME is None or not (Path(CUDA_HOME) / "bin" / "nvcc").exists():
        missing.insert(0, "nvcc")
    if missing:
        raise UnsupportedModel(
            f"kernel injection compiles DeepSpeed's kernels, and {', '.join(missing)} not found: install "
            f"them (nvcc: the CUDA toolkit of PyTorch, found by CUDA_HOME), or {AUTOTP}"
        )
