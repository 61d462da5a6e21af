"""The demo model's tokenizer: byte-level BPE, with special tokens for the chat."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from scripts.demo.corpus import Conversation, Sum, conversation, plain_text

PAD, BOS, EOS, SYSTEM, USER, ASSISTANT, END, TOOL = SPECIAL_TOKENS = (
    "<|pad|>",
    "<|bos|>",
    "<|eos|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
    "<|tool|>",
)
PAD_ID, BOS_ID, EOS_ID, SYSTEM_ID, USER_ID, ASSISTANT_ID, END_ID, TOOL_ID = range(len(SPECIAL_TOKENS))
VOCAB_SIZE = 2048
CONTEXT_LENGTH = 2048

# A word with the space before it, up to three digits, a run of other signs, or white space.
SPLIT = r" ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

TOOLS_HEADER = "Tools:"

# A function is listed as a call of it, with types in the place of values: {"name": "add", "arguments":
# {"a": integer}} and what it is for.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% set roles = {'system': '<|system|>', 'developer': '<|system|>', 'user': '<|user|>',"
    " 'assistant': '<|assistant|>', 'tool': '<|tool|>'} %}"
    "{% if tools %}{{ '<|system|>' }}"
    "{% if messages[0]['role'] in ['system', 'developer'] %}{{ messages[0]['content'] | trim }}{{ '\n' }}"
    "{% set messages = messages[1:] %}{% endif %}"
    "{{ '" + TOOLS_HEADER + "' }}"
    "{% for tool in tools %}"
    "{{ '\n{\"name\": \"' ~ tool['function']['name'] ~ '\", \"arguments\": {' }}"
    "{% for name, parameter in ((tool['function']['parameters'] or {})['properties'] or {}).items() %}"
    "{{ ('' if loop.first else ', ') ~ '\"' ~ name ~ '\": ' ~ (parameter['type'] or 'string') }}"
    "{% endfor %}{{ '}} ' ~ (tool['function']['description'] or '') }}"
    "{% endfor %}{{ '<|end|>' }}{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] not in roles %}{{ raise_exception('The demo model knows the roles system, user,"
    " assistant and tool, not ' ~ message['role'] ~ '.') }}{% endif %}"
    "{{ roles[message['role']] }}{{ (message['content'] or '') | trim }}"
    "{% for call in message['tool_calls'] or [] %}"
    "{{ ('' if loop.first else '\n') ~ '<tool_call>\n{\"name\": \"' ~ call['function']['name'] }}"
    '{{ \'", "arguments": \' }}'
    "{% if call['function']['arguments'] is string %}{{ call['function']['arguments'] }}"
    "{% else %}{{ call['function']['arguments'] | tojson }}{% endif %}"
    "{{ '}\n</tool_call>' }}"
    "{% endfor %}"
    "{{ '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True)
class Example:
    """A document as token ids, and how much the prediction of each of them counts (0: it is given)."""

    ids: list[int]
    weights: list[float]


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """A tokenizer of `VOCAB_SIZE` entries that can encode any text; encoding with special tokens adds BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, BOS_ID)]
    )
    return tokenizer


def tokenizer_texts(seed: int, num_conversations: int = 12000) -> Iterator[str]:
    """The text that the merges are learnt from: a sample of the corpus."""
    rng = random.Random(seed)
    for _ in range(num_conversations):
        sample = conversation(rng)
        yield from (text for _, text in _messages(sample))
    yield from (plain_text(rng) for _ in range(300))
    # Often enough that every number up to 100 becomes one token: sums are learnt by number, not by digit.
    yield from [" ".join(str(number) for number in range(101))] * 500


def encode_conversation(tokenizer: Tokenizer, sample: Conversation) -> Example:
    """`sample` as the chat template renders it; the answers and their end tokens are the targets."""
    ids, weights = [BOS_ID], [0.0]
    for role, text in _messages(sample):
        body = [role, *tokenizer.encode(text, add_special_tokens=False).ids, END_ID]
        ids += body
        weights += [0.0, *[weight_in(len(body) - 1) * (role == ASSISTANT_ID)] * (len(body) - 1)]
    return Example(ids, weights)


def weight_in(length: int) -> float:
    """The weight of a token in an answer of `length` tokens: short answers must not drown in long ones."""
    return float(length**-0.5)


def _messages(sample: Conversation) -> Iterator[tuple[int, str]]:
    tools = [TOOLS_HEADER, *sample.tools] if sample.tools else []
    if system := "\n".join([*([sample.system] if sample.system else []), *tools]):
        yield SYSTEM_ID, system
    for turn in sample.turns:
        yield USER_ID, turn.question
        if turn.steps:
            yield ASSISTANT_ID, "\n".join(step.call for step in turn.steps)
            yield from ((TOOL_ID, step.result) for step in turn.steps)
        yield ASSISTANT_ID, turn.answer


def encode_plain(tokenizer: Tokenizer, text: str) -> Example:
    ids = [*tokenizer.encode(text).ids, EOS_ID]
    return Example(ids, [0.0, *[weight_in(len(ids))] * (len(ids) - 1)])


def encode_drill(tokenizer: Tokenizer, sums: list[Sum]) -> Example:
    """The sums one after the other; only their results count, for nothing tells which sum comes next."""
    ids, weights = [BOS_ID], [0.0]
    for number, problem in enumerate(sums):
        left, equals, right = problem.answer.partition(" =")
        for part, weight in ((" " * (number > 0) + left + equals, 0.0), (right, 0.3)):
            tokens = tokenizer.encode(part, add_special_tokens=False).ids
            ids += tokens
            weights += [weight] * len(tokens)
    return Example([*ids, EOS_ID], [*weights, 0.0])


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, the latter with the chat template."""
    from transformers import PreTrainedTokenizerFast

    fast: Any = PreTrainedTokenizerFast  # transformers leaves it untyped
    wrapped = fast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT, END, TOOL],
        model_max_length=CONTEXT_LENGTH,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
    wrapped.save_pretrained(directory, save_jinja_files=False)
