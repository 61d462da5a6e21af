"""Every engine and layout that the tests run, and its configuration for a model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.config import DeepSpeedSection, ModelConfig


@dataclass(frozen=True)
class Layout:
    """An engine, and how it splits a model. One that is static keeps its own K/V, without blocks."""

    engine: str
    tp: int = 1
    pp: int = 1
    is_static: bool = False

    def __str__(self) -> str:
        return f"{self.engine}-tp{self.tp}-pp{self.pp}"

    @property
    def parallel_type(self) -> str:
        if self.engine in ("accelerate", "fake-inject"):
            return "custom"
        return "tp" if self.pp == 1 else "pp" if self.tp == 1 else "pptp"

    def bytes_per_block(self, model: Path, block_size: int) -> int:
        """What one block of K/V takes, in float32, on a rank that holds an equal share of the layers."""
        config = json.loads((model / "config.json").read_text())
        kv_heads = max(1, config["num_key_value_heads"] // self.tp)
        head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        layers = -(-config["num_hidden_layers"] // self.pp)
        return int(2 * layers * kv_heads * head_dim * 4 * block_size)

    def config(self, model: Path, *, num_blocks: int, block_size: int, max_batched: int) -> ModelConfig:
        """In float32, with a pool of that many blocks."""
        return ModelConfig(
            model_name="model",
            served_model_names=("model",),
            model_path=str(model),
            parallel_type=self.parallel_type,  # type: ignore[arg-type]
            engine=self.engine,
            tp_size=self.tp,
            pp_size=self.pp,
            dtype="float32",
            max_num_batched_tokens=max_batched,
            kv_block_size=block_size,
            kv_cache_memory=num_blocks * self.bytes_per_block(model, block_size),
            startup_timeout=60,
            **(self._static_settings(model) if self.is_static else {}),
        )

    def _static_settings(self, model: Path) -> dict[str, Any]:
        """Kernel injection is chosen by DeepSpeed's file."""
        file = model / "ds-config.json"
        file.write_text(json.dumps({"replace_with_kernel_inject": True}))
        deepspeed = DeepSpeedSection(config=str(file))
        return {"batch_size": 8, "max_batch_delay": 0.02, "deepspeed": deepspeed}


LAYOUTS = [
    Layout("native"),
    Layout("native", tp=2),
    Layout("native", tp=4),
    Layout("pipeline", pp=2),
    Layout("pipeline", pp=3),
    Layout("pipeline", tp=2, pp=2),
    Layout("accelerate"),
    Layout("deepspeed_tp"),
    Layout("deepspeed_tp", tp=2),
]
TWO_STAGE = Layout("two-stage", pp=2)
"""Not ours: tests/engines/two_stage.py comes by an entry point."""
FAKE_INJECT = Layout("fake-inject", is_static=True)
"""deepspeed_inject without a GPU: the engine is ours, the kernels are tests/engines/fake_injected.py's."""
