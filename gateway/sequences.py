"""A prompt and its parameters to the sequences that a group is asked for, every limit checked."""

from __future__ import annotations

import secrets
from collections.abc import Collection

from engines.wire import Generate, Ready, SamplingParams
from gateway.protocol.common import GenerationParams, InvalidField
from gateway.sequence_stream import ContextLengthExceeded


def sequences_of(
    prompt: list[int], prompt_param: str, params: GenerationParams, info: Ready, seed: int, cache_salt: bytes
) -> list[Generate]:
    """The sequences of one prompt. The first one alone is asked for the prompt's log-probabilities."""
    if not prompt:
        raise InvalidField(prompt_param, "The prompt is empty: it has no tokens.")
    _check_ids(prompt, params, info.vocab_size)
    max_tokens = _max_tokens(len(prompt), prompt_param, params, info.max_model_len)
    sampling = SamplingParams(
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
        logit_bias=dict(params.logit_bias),
        seed=seed,
        logprobs=0 if params.logprobs is None and params.best_of else params.logprobs,
    )
    group = secrets.token_hex(12)
    return [
        Generate(
            id=f"{group}-{choice}",
            prompt_ids=prompt,
            max_tokens=max_tokens,
            min_tokens=min(params.min_tokens, max_tokens),
            stop_token_ids=list(params.stop_token_ids),
            ignore_eos=params.ignore_eos,
            sampling=sampling,
            choice=choice,
            prompt_logprobs=params.prompt_logprobs if choice == 0 else None,
            group=group,
            grammar=params.grammar or "",
            cache_salt=cache_salt,
        )
        for choice in range(params.num_drawn)
    ]


def _check_ids(prompt: list[int], params: GenerationParams, vocab_size: int) -> None:
    for param, ids in (
        ("prompt", prompt),
        ("logit_bias", params.logit_bias),
        ("stop_token_ids", params.stop_token_ids),
    ):
        require_known_ids(param, ids, vocab_size)


def require_known_ids(param: str, ids: Collection[int], vocab_size: int) -> None:
    """That the model has them all. Raises InvalidField, which names `param`."""
    if ids and max(ids) >= vocab_size:
        raise InvalidField(
            param, f"'{param}' has the token id {max(ids)}; this model's end at {vocab_size - 1}."
        )


def _max_tokens(num_prompt: int, prompt_param: str, params: GenerationParams, max_model_len: int) -> int:
    """How many tokens may come. Raises ContextLengthExceeded, with the numbers."""
    room = max_model_len - num_prompt
    wanted = None if params.is_max_tokens_default else params.max_tokens
    completion = 1 if wanted is None else wanted
    if completion > room:
        raise ContextLengthExceeded(
            f"This model's maximum context length is {max_model_len} tokens. However, you requested"
            f" {num_prompt + completion} tokens ({num_prompt} in the prompt, {completion} in the completion)."
            " Please reduce the length of the prompt or of the completion.",
            prompt_param,
        )
    return room if params.max_tokens is None else min(params.max_tokens, room)
