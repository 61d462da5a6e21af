"""Runs an engine without scheduler and runner: batches made by hand, greedy tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.distributed as dist

from engines.base import Batch, Engine, ReportProgress
from engines.config import ModelConfig
from engines.native import NativeEngine
from engines.runtime.context import ForwardContext, forward_context
from engines.runtime.kv_cache import LayerCache, allocate
from engines.runtime.mesh import Mesh, single


def native(
    directory: Path, mesh: Mesh | None = None, report: ReportProgress = lambda *_: None, **settings: Any
) -> NativeEngine:
    """The native engine over a model directory; `settings` over those of a configuration's defaults."""
    config = SimpleNamespace(
        **{
            "model_path": str(directory),
            "dtype": "auto",
            "max_model_len": None,
            "reshard": False,
            "deterministic": False,
            "int8_activations": True,
            "pack_weights": True,
        }
        | settings
    )  # all that the engine reads of it
    return NativeEngine(cast(ModelConfig, config), mesh or single(), report)


@dataclass
class Row:
    """One sequence of the driver."""

    token_ids: list[int]
    blocks: list[int]
    num_prompt: int
    num_computed: int = 0
    logits: list[torch.Tensor] = field(default_factory=list)

    @property
    def generated(self) -> list[int]:
        return self.token_ids[self.num_prompt :]


def make_batch(rows: Sequence[Row], counts: Sequence[int], block_size: int) -> Batch:
    """The next counts[i] tokens of each row. Logits are asked for every sequence's last token."""
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    starts, contexts = [0], []
    for row, count in zip(rows, counts, strict=True):
        stop = row.num_computed + count
        span = range(row.num_computed, stop)
        ids += row.token_ids[row.num_computed : stop]
        positions += span
        slots += [row.blocks[p // block_size] * block_size + p % block_size for p in span]
        starts.append(len(ids))
        contexts.append(stop)
    widths = [-(-context // block_size) for context in contexts]
    tables = [
        row.blocks[:w] + row.blocks[:1] * (max(widths) - w) for row, w in zip(rows, widths, strict=True)
    ]
    return Batch(
        input_ids=torch.tensor(ids),
        positions=torch.tensor(positions),
        slot_mapping=torch.tensor(slots),
        query_start=torch.tensor(starts, dtype=torch.int32),
        context_lens=torch.tensor(contexts, dtype=torch.int32),
        block_tables=torch.tensor(tables, dtype=torch.int32),
        logit_rows=torch.tensor(starts[1:]) - 1,
        query_start_list=starts,
        context_lens_list=contexts,
        max_query_len=max(counts),
        max_context_len=max(contexts),
    )


class Driver:
    """Greedy decoding of several sequences, prefilled in chunks; blocks are handed out scattered."""

    def __init__(
        self, engine: Engine, num_blocks: int, block_size: int, group: dist.ProcessGroup | None = None
    ) -> None:
        assert engine.kv_spec is not None
        self.engine, self.block_size, self.group = engine, block_size, group
        self.caches: list[LayerCache] = allocate(engine.kv_spec, num_blocks, block_size)
        order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(7))
        self._free = order.tolist()

    def add(self, prompt: Sequence[int], max_tokens: int) -> Row:
        num_blocks = -(-(len(prompt) + max_tokens) // self.block_size)
        blocks = [self._free.pop() for _ in range(num_blocks)]
        return Row(list(prompt), blocks, len(prompt))

    @torch.inference_mode()
    def step(self, rows: Sequence[Row], chunk: int) -> torch.Tensor | None:
        """Feed each row at most `chunk` pending tokens; rows without any left get their next token."""
        counts = [min(len(row.token_ids) - row.num_computed, chunk) for row in rows]
        batch = replace(make_batch(rows, counts, self.block_size), reads_all=False)
        with forward_context(ForwardContext(batch, self.caches)):
            hidden = self.engine.forward(batch)
        assert hidden is not None
        logits = self.engine.logits(hidden.index_select(0, batch.logit_rows))
        for row, count, token in zip(rows, counts, self._likeliest(logits, len(rows)), strict=True):
            row.num_computed += count
            if row.num_computed == len(row.token_ids):
                row.token_ids.append(token)
        return logits

    def _likeliest(self, logits: torch.Tensor | None, num_rows: int) -> list[int]:
        """Rank 0 has the logits and tells the others."""
        tokens = torch.zeros(num_rows, dtype=torch.int64) if logits is None else logits.argmax(-1)
        if self.group is not None:
            dist.broadcast(tokens, 0, group=self.group)
        return tokens.tolist()


def generate(
    engine: Engine, prompts: Sequence[Sequence[int]], num_tokens: int, **how: Any
) -> list[list[int]]:
    """Greedy tokens of each prompt, all in one batch; sequence i joins at step i * stagger."""
    block_size, chunk, stagger = how.get("block_size", 4), how.get("chunk", 5), how.get("stagger", 0)
    longest = max(len(prompt) for prompt in prompts) + num_tokens
    num_blocks = (longest // block_size + 2) * len(prompts)
    driver = Driver(engine, num_blocks, block_size, how.get("group"))
    rows = [driver.add(prompt, num_tokens) for prompt in prompts]
    for step in range((longest + 1) * len(prompts) + stagger * len(prompts)):
        joined = [row for i, row in enumerate(rows) if step >= i * stagger]
        running = [row for row in joined if len(row.generated) < num_tokens]
        if running:
            driver.step(running, chunk)
        elif len(joined) == len(rows):
            break
    return [row.generated for row in rows]
