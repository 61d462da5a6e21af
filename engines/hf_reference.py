"""transformers' own greedy tokens, for `sluice parity --reference hf`.

`python -m engines.hf_reference MODEL_DIR DTYPE DEVICE` reads {"prompts": [[id, ...]], "max_tokens": n,
"num_top": k} and writes a list of what gateway.parity_compare.Answer holds, both as JSON: token ids, their
log-probabilities, and the k likeliest at each place. No code of the model directory is run, and only
safetensors are read.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from engines.models.hf_support import read_config

Answer = dict[str, Any]


def main(model_dir: str, dtype: str, device: str) -> None:
    question = json.load(sys.stdin)
    read_config(model_dir)
    model: Any = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=getattr(torch, dtype), use_safetensors=True, local_files_only=True
    )
    model = model.to(device).eval()
    max_tokens, num_top = question["max_tokens"], question["num_top"]
    answers = [answer_of(model, prompt, max_tokens, num_top) for prompt in question["prompts"]]
    json.dump(answers, sys.stdout)


@torch.inference_mode()
def answer_of(model: PreTrainedModel, prompt: list[int], max_tokens: int, num_top: int) -> Answer:
    """One prompt alone: nothing is padded."""
    ids = torch.tensor([prompt], device=model.device)
    out: Any = model.generate(  # type: ignore[operator]
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        min_new_tokens=max_tokens,
        max_new_tokens=max_tokens,
        eos_token_id=[],
        pad_token_id=0,
    )
    tokens = out[0, len(prompt) :]
    logits = model(input_ids=out).logits[0, len(prompt) - 1 : -1].float()
    scores = logits.log_softmax(-1)  # [max_tokens, V]
    top = scores.topk(min(num_top, scores.shape[-1]))
    places = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return {
        "token_ids": tokens.tolist(),
        "forced_logprobs": scores.gather(1, tokens[:, None])[:, 0].tolist(),
        "forced_top": [list(zip(ids, values, strict=True)) for ids, values in places],
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
