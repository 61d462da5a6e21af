"""Train the demo model and write it to gateway/demo_model/.

    .venv/bin/python -m scripts.demo.train_demo
    .venv/bin/python -m scripts.demo.train_demo --steps 50 --out /tmp/try

The run is seeded: corpus, tokenizer, initial weights and the order of the text depend only on --seed. The
last bits of the weights, and with them a few answers, also depend on the number of threads and the
version of torch, which the log names. A GPU is used if there is one. `--out` gets the model's files, with
new weights every `--save-every` steps, and training_log.txt, which ends with the evaluation. How the model in
the repository was made, in three runs, is in its README.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import tokenizers
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from engines.runtime import cpu
from scripts.demo import evaluate
from scripts.demo.corpus import conversation, drill, plain_text
from scripts.demo.muon import Muon
from scripts.demo.tokenizer import (
    BOS_ID,
    CONTEXT_LENGTH,
    END_ID,
    EOS_ID,
    PAD_ID,
    VOCAB_SIZE,
    Example,
    encode_conversation,
    encode_drill,
    encode_plain,
    save_tokenizer,
    tokenizer_texts,
    train_tokenizer,
)

ROOT = Path(__file__).resolve().parents[2]
PLAIN_SHARE, DRILL_SHARE = 0.05, 0.1
TOKENS_PER_STEP = 4096
ROW = 512  # tokens in a row of a batch; distances up to here are trained


@dataclass(frozen=True)
class Schedule:
    """Learning rate: linear warm-up, then a cosine down to a twentieth."""

    steps: int
    peak: float
    warmup: int

    def at(self, step: int) -> float:
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


def demo_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=CONTEXT_LENGTH,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=BOS_ID,
        eos_token_id=[EOS_ID, END_ID],
        pad_token_id=PAD_ID,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )


def examples(tokenizer: tokenizers.Tokenizer, rng: random.Random) -> Iterator[Example]:
    """Documents without end: conversations, and now and then plain text or a page of sums."""
    while True:
        draw = rng.random()
        if draw < PLAIN_SHARE:
            yield encode_plain(tokenizer, plain_text(rng))
        elif draw < PLAIN_SHARE + DRILL_SHARE:
            yield encode_drill(tokenizer, drill(rng))
        else:
            yield encode_conversation(tokenizer, conversation(rng))


@dataclass(frozen=True)
class TrainingBatch:
    """`inputs` `[B, T]`; `mask` `[B, 1, T, T]`, true where a token may look; the others `[B * T]`."""

    inputs: Tensor
    mask: Tensor
    targets: Tensor
    weights: Tensor


def packed_row(documents: Iterator[Example]) -> tuple[list[int], list[float], list[int]]:
    """Ids, weights and document numbers of whole documents one after the other, the last one cut."""
    ids: list[int] = []
    weights: list[float] = []
    owners: list[int] = []
    while len(ids) <= ROW:
        document = next(documents)
        owners += [len(ids)] * len(document.ids)
        ids += document.ids
        weights += document.weights
    return ids[: ROW + 1], weights[: ROW + 1], owners[:ROW]


def batch_of(documents: Iterator[Example], device: torch.device) -> TrainingBatch:
    rows = [packed_row(documents) for _ in range(TOKENS_PER_STEP // ROW)]
    ids = torch.tensor([row[0] for row in rows], device=device)  # [B, T + 1]
    weights = torch.tensor([row[1] for row in rows], device=device)
    owners = torch.tensor([row[2] for row in rows], device=device)  # [B, T]
    same = owners[:, None, :, None] == owners[:, None, None, :]
    causal = torch.ones(ROW, ROW, dtype=torch.bool, device=device).tril()
    return TrainingBatch(ids[:, :-1], same & causal, ids[:, 1:].flatten(), weights[:, 1:].flatten())


def loss_of(model: LlamaForCausalLM, body: Callable[..., Any], batch: TrainingBatch) -> Tensor:
    """Weighted mean of the cross entropy; the output layer sees only the rows that count."""
    scored = batch.weights.nonzero().squeeze(1)  # [N]
    kind = batch.inputs.device.type
    with torch.autocast(kind, torch.bfloat16, enabled=kind != "cpu" or cpu.has_bfloat16()):
        hidden = body(input_ids=batch.inputs, attention_mask=batch.mask, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden.flatten(0, 1)[scored])  # [N, vocab]
    losses = nn.functional.cross_entropy(logits.float(), batch.targets[scored], reduction="none")
    return (losses * batch.weights[scored]).sum() / batch.weights.sum()


def optimizers_of(model: LlamaForCausalLM) -> tuple[torch.optim.Optimizer, ...]:
    """Muon for the matrices inside the layers: it needs fewer steps. AdamW for all else."""
    inner = [p for p in model.model.layers.parameters() if p.ndim == 2]
    outer = [p for p in model.parameters() if p.ndim != 2 or p is model.model.embed_tokens.weight]
    return (
        Muon(inner, weight_decay=0.05),
        torch.optim.AdamW(outer, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    )


def train(
    model: LlamaForCausalLM, documents: Iterator[Example], options: argparse.Namespace, log: TextIO
) -> None:
    """Run all steps; log the loss, and save the weights now and then."""
    schedule = Schedule(options.steps, options.learning_rate, warmup=min(60, options.steps // 10))
    optimizers = optimizers_of(model)
    started, recent = time.monotonic(), 0.0
    model.train()
    body = torch.compile(model.model, dynamic=False) if options.compile else model.model
    for step in range(options.steps):
        loss = loss_of(model, body, batch_of(documents, model.device))
        loss.backward()  # type: ignore[no-untyped-call]
        update(model, optimizers, schedule.at(step))
        recent = loss.item() if step < 20 else 0.9 * recent + 0.1 * loss.item()
        if step % 25 == 0 or step + 1 == options.steps:
            done = f"{(step + 1) * TOKENS_PER_STEP} tokens  {time.monotonic() - started:.0f} s"
            report(log, f"step {step:5d}  loss {recent:.4f}  lr {schedule.at(step):.2e}  {done}")
        if (step + 1) % options.save_every == 0:
            save_weights(model, options.out)


def update(
    model: LlamaForCausalLM, optimizers: tuple[torch.optim.Optimizer, ...], learning_rate: float
) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        optimizer.zero_grad()


def report(log: TextIO, line: str) -> None:
    log.write(line + "\n")
    log.flush()
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def save_weights(model: LlamaForCausalLM, directory: Path) -> None:
    """model.safetensors in bfloat16, without the output layer, which is the embedding."""
    tensors = {
        name: tensor.detach().to("cpu", torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "model.safetensors").chmod(0o644)


def save_configs(config: LlamaConfig, directory: Path) -> None:
    config.save_pretrained(directory)
    untyped: Any = GenerationConfig
    generation = untyped(
        bos_token_id=BOS_ID, eos_token_id=[EOS_ID, END_ID], pad_token_id=PAD_ID, do_sample=False
    )
    generation.save_pretrained(directory)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train Sluice's demo model.")
    parser.add_argument("--out", type=Path, default=ROOT / "gateway" / "demo_model")
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="without a C++ compiler")
    parser.add_argument(
        "--more", action="store_true", help="go on from the weights in --out, with text of the next seed"
    )
    parser.add_argument("--save-every", type=int, default=200)
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any
    if options.more:
        tokenizer = tokenizers.Tokenizer.from_file(str(options.out / "tokenizer.json"))
        model = LlamaForCausalLM.from_pretrained(options.out)
    else:
        tokenizer = train_tokenizer(tokenizer_texts(options.seed))
        save_tokenizer(tokenizer, options.out)
        save_configs(demo_config(), options.out)
        model = LlamaForCausalLM(demo_config())
    model.to(device=device, dtype=torch.float32)
    with (options.out / "training_log.txt").open("a" if options.more else "w", encoding="utf-8") as log:
        versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
        report(log, f"{versions}, tokenizers {tokenizers.__version__}, {device}, {options.threads} threads")
        report(log, f"seed {options.seed}, {options.steps} steps of {TOKENS_PER_STEP} tokens")
        report(log, f"{sum(p.numel() for p in model.parameters())} parameters")
        rng = random.Random(options.seed + options.more)
        train(model, examples(tokenizer, rng), options, log)
        save_weights(model, options.out)
        for line in evaluate.evaluate(options.out, device):
            report(log, line)


if __name__ == "__main__":
    main()
