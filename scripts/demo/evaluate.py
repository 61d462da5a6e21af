"""Ask the demo model what it was not trained on, and count the answers that are right to the letter.

.venv/bin/python -m scripts.demo.evaluate [DIRECTORY]
"""

from __future__ import annotations

import random
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from scripts.demo import corpus, tools
from scripts.demo.corpus import Sum, Turn
from scripts.demo.wild import WILD

MAX_NEW_TOKENS = 400
BATCH = 64
UNKNOWN = "unknown subjects, never seen"


@dataclass(frozen=True)
class Question:
    """A chat so far, the functions that it lists, and the answer that is right."""

    chat: list[dict[str, Any]]
    answer: str
    tools: list[dict[str, object]] | None = None

    @property
    def text(self) -> str:
        return str(self.chat[-1]["content"])


@dataclass(frozen=True)
class Answer:
    """`text` without the end token, and whether there was one. `margins`: top logit minus the second."""

    text: str
    is_ended: bool
    margins: list[float]


def load(directory: Path, device: str) -> tuple[Any, Any]:
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model.to(device).eval(), AutoTokenizer.from_pretrained(directory, padding_side="left")


@torch.inference_mode()
def ask(model: Any, tokenizer: Any, questions: list[Question], limit: int = MAX_NEW_TOKENS) -> list[Answer]:
    """Greedy answers in fp32, in batches of questions of similar length."""
    prompts = [
        tokenizer.apply_chat_template(q.chat, tools=q.tools, add_generation_prompt=True, tokenize=False)
        for q in questions
    ]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: dict[int, Answer] = {}
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        texts = [prompts[i] for i in chosen]
        inputs = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt").to(
            model.device
        )
        output = model.generate(
            **inputs, max_new_tokens=limit, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        tops = torch.stack([step.topk(2).values for step in output.logits], 1)  # [B, T, 2]
        new = output.sequences[:, inputs["input_ids"].shape[1] :]
        for row, i in enumerate(chosen):
            answers[i] = _answer(tokenizer, new[row].tolist(), (tops[row, :, 0] - tops[row, :, 1]).tolist())
    return [answers[i] for i in range(len(questions))]


def _answer(tokenizer: Any, ids: list[int], margins: list[float]) -> Answer:
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    length = ids.index(end) if end in ids else len(ids)
    return Answer(tokenizer.decode(ids[:length]), end in ids, margins[: length + 1])


def asked(turns: list[Turn]) -> list[Question]:
    return [Question([{"role": "user", "content": turn.question}], turn.answer) for turn in turns]


def held_out_facts(rng: random.Random) -> list[Turn]:
    """Up to four questions of each fact that training never saw."""
    return [
        Turn("known", question, fact.answer)
        for fact, questions in corpus.fact_questions(held_out=True)
        for question in rng.sample(questions, min(4, len(questions)))
    ]


def small_sums(rng: random.Random) -> list[Turn]:
    """All operands alike; the sums themselves were trained, in other draws of the wordings."""
    problems = [Sum(rng.randint(0, 20), rng.choice("+-"), rng.randint(0, 20)) for _ in range(200)]
    return [Turn("sum", corpus.ask_sum(p, rng), p.answer) for p in problems]


def large_sums(rng: random.Random) -> list[Turn]:
    return [corpus.too_large(rng) for _ in range(100)]


def unknowns(rng: random.Random) -> list[Turn]:
    return [corpus.unknown(rng, held_out=True) for _ in range(200)]


def puzzles(rng: random.Random) -> list[Turn]:
    return [corpus.puzzle(rng) for _ in range(100)]


def calls(rng: random.Random) -> list[Question]:
    """Functions listed in new words, asked for with new values."""
    found = []
    for _ in range(200):
        listed = tools.some_listed(rng)
        question, step, _ = tools.ask(rng.choice(listed), rng)
        chat = [{"role": "user", "content": question}]
        found.append(Question(chat, step.call, [each.definition for each in listed]))
    return found


def results(rng: random.Random) -> list[Question]:
    """The same, when the function has answered."""
    found = []
    for _ in range(100):
        listed = tools.some_listed(rng)
        question, step, told = tools.ask(rng.choice(listed), rng)
        chat = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": step.call},
            {"role": "tool", "content": step.result},
        ]
        found.append(Question(chat, told, [each.definition for each in listed]))
    return found


def records(rng: random.Random) -> list[Turn]:
    return [Turn("json", *tools.record(rng)) for _ in range(200)]


SUITES: tuple[tuple[str, Callable[[random.Random], list[Question]]], ...] = (
    ("known facts, held-out paraphrases", lambda rng: asked(held_out_facts(rng))),
    ("known facts, questions written by hand", lambda _: asked([Turn("wild", q, a) for q, a in WILD])),
    ("sums of numbers up to 20", lambda rng: asked(small_sums(rng))),
    ("sums of larger numbers, to be declined", lambda rng: asked(large_sums(rng))),
    (UNKNOWN, lambda rng: asked(unknowns(rng))),
    ("counting, letters, parity", lambda rng: asked(puzzles(rng))),
    ("calls of listed functions", calls),
    ("what a function answered, told", results),
    ("sentences into JSON", lambda rng: asked(records(rng))),
)


def is_refusal(text: str) -> bool:
    return text.startswith(("I don't know", "I can't"))


def evaluate(directory: Path, device: str = "cpu", show_misses: int = 0) -> Iterator[str]:
    """One line a suite: exact answers, answers that end, and the argmax margins of all tokens."""
    model, tokenizer = load(directory, device)
    for name, suite in SUITES:
        turns = suite(random.Random(7))
        answers = ask(model, tokenizer, turns)
        margins = [margin for answer in answers for margin in answer.margins]
        refusing = sum(is_refusal(answer.text) for answer in answers)
        exact = sum(answer.text == turn.answer for answer, turn in zip(answers, turns, strict=True))
        ended = sum(answer.is_ended for answer in answers)
        extra = f", refused {refusing / len(turns):.1%}" if name == UNKNOWN else ""
        yield (
            f"{name}: {exact}/{len(turns)} exact ({exact / len(turns):.1%}){extra}, {ended} ended;"
            f" logit margin median {statistics.median(margins):.2f},"
            f" lowest percentile {statistics.quantiles(margins, n=100)[0]:.2f}"
        )
        misses = [(t, a) for t, a in zip(turns, answers, strict=True) if a.text != t.answer]
        yield from (f"    {t.text!r} -> {a.text!r}" for t, a in misses[:show_misses])


if __name__ == "__main__":
    torch.set_num_threads(2)
    chosen = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[2] / "gateway" / "demo_model"
    for line in evaluate(chosen, show_misses=12):
        sys.stdout.write(line + "\n")
