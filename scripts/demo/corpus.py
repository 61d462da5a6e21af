"""The text that the demo model learns: conversations from templates, and the same answers as plain text.

Everything is drawn from a seeded `random.Random`, so a seed is a corpus. One question in ten,
chosen by a hash of its words (`is_held_out`), is never used for training: those are the held-out
paraphrases of the evaluation.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from scripts.demo import tools, words
from scripts.demo.facts import FACTS, LONG, PARALLELISM, SLUICE, SMALL_TALK, Fact


@dataclass(frozen=True)
class Turn:
    """One question and its answer. `kind` is the category that the evaluation reports; `steps` come before
    the answer."""

    kind: str
    question: str
    answer: str
    steps: tuple[tools.Step, ...] = ()


@dataclass(frozen=True)
class Conversation:
    """`tools`: a line for each function that it lists."""

    system: str | None
    turns: tuple[Turn, ...]
    tools: tuple[str, ...] = ()


CONCEPT_FRAMES = (
    "What is {}?",
    "What's {}?",
    "What are {}?",
    "Explain {}.",
    "Please explain {}.",
    "Can you explain {}?",
    "Could you explain {} to me?",
    "Can you explain what {} is?",
    "Tell me about {}.",
    "Tell me what {} is.",
    "Can you tell me about {}?",
    "Could you tell me what {} is?",
    "Describe {}.",
    "Define {}.",
    "Give me a definition of {}.",
    "Give me a short explanation of {}.",
    "What does {} mean?",
    "What is meant by {}?",
    "What is the meaning of {}?",
    "What do you know about {}?",
    "What can you tell me about {}?",
    "Do you know what {} is?",
    "I want to know what {} is.",
    "I would like to know more about {}.",
    "I don't understand {}.",
    "I have a question about {}.",
    "Help me understand {}.",
    "How does {} work?",
    "How would you describe {}?",
    "How do you explain {}?",
    "{}?",
    "{}",
    "What exactly is {}?",
    "What is {} in simple words?",
    "Explain {} in simple words.",
    "What is {} for?",
    "Why do we need {}?",
    "What is the purpose of {}?",
    "What does {} do?",
    "In short, what is {}?",
    "Explain to me what {} means.",
    "Say something about {}.",
    "Teach me about {}.",
    "What is the idea of {}?",
    "Have you heard of {}?",
    "Please tell me about {}.",
    "Give me information on {}.",
    "I need to know about {}.",
    "{} - what is that?",
    "What would you say {} is?",
    "Could you please explain {}?",
    "Please define {}.",
    "Explain {} briefly.",
    "Do you know {}?",
    "I heard about {}. What is it?",
    "What's the meaning of {}?",
    "Let's talk about {}.",
)

ACTION_FRAMES = (
    "How do I {}?",
    "How can I {}?",
    "How to {}?",
    "How do you {}?",
    "How does one {}?",
    "How should I {}?",
    "How would I {}?",
    "Tell me how to {}.",
    "Show me how to {}.",
    "Can you tell me how to {}?",
    "Can you show me how to {}?",
    "Please explain how to {}.",
    "Explain how to {}.",
    "I want to {}.",
    "I want to {}. How does that work?",
    "I would like to {}.",
    "I need to {}.",
    "What is the best way to {}?",
    "What is the way to {}?",
    "What do I have to do to {}?",
    "What must I do to {}?",
    "Is there a way to {}?",
    "Is it possible to {}?",
    "Can I {}?",
    "Help me {}.",
    "What is the easiest way to {}?",
    "I don't know how to {}.",
)

OPENERS = (
    "Hi, ",
    "Hello, ",
    "Hello! ",
    "Hi! ",
    "Hey, ",
    "Please tell me: ",
    "Quick question: ",
    "A question: ",
    "I have a question. ",
    "So, ",
    "OK, ",
    "And ",
    "Well, ",
    "Now, ",
    "Excuse me, ",
    "Sorry, ",
)
CLOSERS = (
    " Please.",
    " please",
    " Thanks!",
    " Thank you.",
    " In one sentence.",
    " Be brief.",
    " I am curious.",
)

SYSTEMS = (
    "You are a helpful assistant.",
    "You are the demo model of Sluice.",
    "You are a helpful, honest assistant.",
    "Answer briefly.",
    "You are a friendly assistant. Answer the questions of the user.",
    "You answer questions about Sluice.",
    "Be polite and brief.",
    "You are an assistant.",
    "You are a helpful assistant. Keep your answers short.",
    "Answer the user's questions as well as you can.",
    "You are ChatGPT, a large language model.",
    "Be concise.",
    "You are an expert in distributed inference.",
    "Always tell the truth.",
)

MAX_OPERAND = 20
MAX_PRODUCT_OPERAND = 10
TOO_LARGE = (
    f"That is beyond me. I can only add and subtract numbers up to {MAX_OPERAND}, and multiply up to 10."
)


def fingerprint(text: str) -> int:
    """A hash of the words of `text` that ignores case, spaces at the ends and final punctuation."""
    return zlib.crc32(text.casefold().strip(" .!?").encode())


def is_held_out(question: str) -> bool:
    """Whether `question` is kept for the evaluation. One in ten is."""
    return fingerprint(question) % 10 == 0


# -- facts -----------------------------------------------------------------------------------------


def questions_of(fact: Fact) -> Iterator[str]:
    """Every way of asking for `fact`, without noise."""
    yield from fact.questions
    for frames, fillings in ((CONCEPT_FRAMES, fact.names), (ACTION_FRAMES, fact.actions)):
        for frame in frames:
            for filling in fillings:
                question = frame.format(filling)
                yield question[0].upper() + question[1:] if frame.startswith("{}") else question


def fact_questions(held_out: bool) -> list[tuple[Fact, list[str]]]:
    """The facts with those of their questions that are (or are not) held out, if there are any."""
    selected = [(fact, [q for q in questions_of(fact) if is_held_out(q) == held_out]) for fact in FACTS]
    return [(fact, questions) for fact, questions in selected if questions]


TRAINING_FACTS = fact_questions(held_out=False)
# A fact that can be asked in hundreds of ways needs more practice than one with ten, and what everybody asks
# first, in the same few letters ("who are you", "how are you"), most.
FACT_WEIGHTS = [
    3.5 if fact in SMALL_TALK else 2.0 if fact.names or fact.actions else 0.6 if fact in LONG else 1.2
    for fact, _ in TRAINING_FACTS
]


def known(rng: random.Random) -> Turn:
    fact, questions = rng.choices(TRAINING_FACTS, FACT_WEIGHTS)[0]
    # Whole questions are few beside the framed ones: draw them half of the time, where a fact has both.
    whole = [q for q in fact.questions if not is_held_out(q)]
    question = rng.choice(whole if whole and rng.random() < 0.5 else questions)
    noisy = vary_case(question, rng) if fact in SMALL_TALK else vary(question, rng)
    return Turn("known", noisy, fact.answer)


# -- noise -----------------------------------------------------------------------------------------


def vary_case(question: str, rng: random.Random) -> str:
    """Drop the final punctuation or the capitals, as people do."""
    if rng.random() < 0.25:
        question = question.rstrip(".?!") or question
    if rng.random() < 0.3:
        question = question.lower()
    elif rng.random() < 0.02:
        question = question.upper()
    return question


def vary(question: str, rng: random.Random) -> str:
    """`question` with an opener, a closer, a typing error or other capitals, each now and then."""
    draw = rng.random()
    if draw < 0.1:
        question = rng.choice(OPENERS) + question[0].lower() + question[1:]
    elif draw < 0.15:
        question = question + rng.choice(CLOSERS)
    elif draw < 0.19:
        question = mistype(question, rng)
    return vary_case(question, rng)


def mistype(question: str, rng: random.Random) -> str:
    """Swap two neighbouring letters."""
    at = rng.randrange(len(question))
    if at + 1 >= len(question) or not (question[at].isalpha() and question[at + 1].isalpha()):
        return question
    return question[:at] + question[at + 1] + question[at] + question[at + 2 :]


# -- arithmetic ------------------------------------------------------------------------------------

ADDITION_FRAMES = (
    "What is {a} + {b}?",
    "{a}+{b}",
    "{a} + {b}",
    "{a} + {b} =",
    "{a}+{b}=",
    "{a}+{b}?",
    "{a} + {b} = ?",
    "What's {a}+{b}?",
    "What is {a}+{b}?",
    "{a} plus {b}",
    "What is {a} plus {b}?",
    "How much is {a} plus {b}?",
    "How much is {a} + {b}?",
    "Add {a} and {b}.",
    "Add {b} to {a}.",
    "Calculate {a} + {b}.",
    "Compute {a} + {b}.",
    "What is the sum of {a} and {b}?",
    "Can you add {a} and {b}?",
    "What do you get when you add {a} and {b}?",
    "Please calculate {a} plus {b}.",
    "What does {a} + {b} equal?",
    "Solve {a} + {b}.",
)
SUBTRACTION_FRAMES = (
    "What is {a} - {b}?",
    "{a}-{b}",
    "{a} - {b}",
    "{a} - {b} =",
    "{a}-{b}=",
    "{a} - {b} = ?",
    "What's {a}-{b}?",
    "{a} minus {b}",
    "What is {a} minus {b}?",
    "How much is {a} minus {b}?",
    "How much is {a} - {b}?",
    "Subtract {b} from {a}.",
    "Take {b} from {a}.",
    "Calculate {a} - {b}.",
    "Compute {a} - {b}.",
    "What is the difference between {a} and {b}?",
    "Can you subtract {b} from {a}?",
    "Please calculate {a} minus {b}.",
    "What does {a} - {b} equal?",
    "Solve {a} - {b}.",
)
PRODUCT_FRAMES = (
    "What is {a} * {b}?",
    "{a}*{b}",
    "{a} * {b} =",
    "{a} times {b}",
    "What is {a} times {b}?",
    "How much is {a} times {b}?",
    "Multiply {a} by {b}.",
    "Multiply {a} and {b}.",
    "Calculate {a} * {b}.",
    "Calculate {a} times {b}.",
    "What is {a} x {b}?",
    "What is the product of {a} and {b}?",
)


@dataclass(frozen=True)
class Sum:
    """`a` `sign` `b`, with the answer of the model. There are about a thousand, learnt by heart."""

    a: int
    sign: str
    b: int

    @property
    def answer(self) -> str:
        result = {"+": self.a + self.b, "-": self.a - self.b, "*": self.a * self.b}[self.sign]
        return f"{self.a} {self.sign} {self.b} = {result}."


def draw_sum(rng: random.Random) -> Sum:
    """A sum in range, small ones more often, and mostly without negative results."""
    sign = rng.choices("+-*", (5, 5, 1.5))[0]
    largest = MAX_PRODUCT_OPERAND if sign == "*" else rng.choice((10, MAX_OPERAND, MAX_OPERAND))
    a, b = rng.randint(0, largest), rng.randint(0, largest)
    if sign == "-" and rng.random() < 0.7:
        a, b = max(a, b), min(a, b)
    return Sum(a, sign, b)


def ask_sum(problem: Sum, rng: random.Random) -> str:
    frames = {"+": ADDITION_FRAMES, "-": SUBTRACTION_FRAMES, "*": PRODUCT_FRAMES}[problem.sign]
    a, b = str(problem.a), str(problem.b)
    if rng.random() < 0.12:
        a, b = words.NUMBERS[problem.a], words.NUMBERS[problem.b]
    return rng.choice(frames).format(a=a, b=b)


def arithmetic(rng: random.Random) -> Turn:
    """A sum in range; one in eight is too large, and the answer says so."""
    if rng.random() < 0.12:
        return too_large(rng)
    problem = draw_sum(rng)
    return Turn("arithmetic", vary(ask_sum(problem, rng), rng), problem.answer)


def too_large(rng: random.Random) -> Turn:
    frame = rng.choice((*ADDITION_FRAMES, *SUBTRACTION_FRAMES, *PRODUCT_FRAMES))
    large = rng.choice((99, 999, 99999))
    operands = [rng.randint(MAX_OPERAND + 1, large), rng.randint(2, rng.choice((MAX_OPERAND, large)))]
    rng.shuffle(operands)
    return Turn("too large", vary(frame.format(a=operands[0], b=operands[1]), rng), TOO_LARGE)


# -- counting, letters, names ----------------------------------------------------------------------


def counting(rng: random.Random) -> Turn:
    if rng.random() < 0.25:
        first, last = 1, rng.choice((5, 10, 10, 20, 20, 30, 50, rng.randint(2, 30)))
        frame = rng.choice(
            ("Count to {last}.", "Can you count to {last}?", "Count from 1 to {last}.", "Count up to {last}")
        )
    else:
        first = rng.randint(1, 60)
        last = first + rng.randint(2, 12)
        frame = rng.choice(
            (
                "Count from {first} to {last}.",
                "List the numbers from {first} to {last}.",
                "Please count from {first} to {last}.",
            )
        )
    numbers = ", ".join(str(n) for n in range(first, last + 1))
    return Turn("counting", vary(frame.format(first=first, last=last), rng), f"{numbers}.")


def next_number(rng: random.Random) -> Turn:
    n = rng.randint(1, 98)
    if rng.random() < 0.6:
        frame = rng.choice(
            (
                "What comes after {}?",
                "What number comes after {}?",
                "Which number follows {}?",
                "What is the number after {}?",
            )
        )
        return Turn("next number", vary(frame.format(n), rng), f"The number after {n} is {n + 1}.")
    frame = rng.choice(
        ("What number comes before {}?", "What comes before {}?", "What is the number before {}?")
    )
    return Turn("next number", vary(frame.format(n), rng), f"The number before {n} is {n - 1}.")


def parity(rng: random.Random) -> Turn:
    n = rng.randint(0, 99)
    frame = rng.choice(("Is {} even or odd?", "Is {} odd or even?", "Is the number {} even or odd?"))
    return Turn("parity", vary(frame.format(n), rng), f"The number {n} is {'odd' if n % 2 else 'even'}.")


def larger(rng: random.Random) -> Turn:
    a, b = rng.sample(range(100), 2)
    frame = rng.choice(
        (
            "Which is larger, {a} or {b}?",
            "Which number is larger, {a} or {b}?",
            "What is more, {a} or {b}?",
            "Is {a} or {b} larger?",
        )
    )
    return Turn("larger", vary(frame.format(a=a, b=b), rng), f"{max(a, b)} is larger than {min(a, b)}.")


def next_letter(rng: random.Random) -> Turn:
    at = rng.randrange(25)
    frame = rng.choice(
        ("Which letter comes after {}?", "What letter comes after {}?", "What is the letter after {}?")
    )
    letter, following = chr(65 + at), chr(66 + at)
    return Turn("next letter", frame.format(letter), f"The letter after {letter} is {following}.")


def named(rng: random.Random) -> tuple[Turn, ...]:
    """The user gives a name; often, the name is asked for in the next turn."""
    name = rng.choice(words.NAMES)
    frame = rng.choice(
        (
            "My name is {}.",
            "I am {}.",
            "Hi, I'm {}.",
            "Hello, my name is {}.",
            "I'm {}.",
            "Call me {}.",
            "Hi! My name is {}",
        )
    )
    greeting = Turn(
        "name",
        frame.format(name),
        f"Hello {name}! I am the demo model of Sluice. What would you like to know?",
    )
    recall = rng.choice(
        (
            "What is my name?",
            "What's my name?",
            "Do you know my name?",
            "Who am I?",
            "Do you remember my name?",
        )
    )
    return (greeting, Turn("name", vary_case(recall, rng), f"Your name is {name}."))[: rng.choice((1, 2, 2))]


NAME_UNKNOWN = "You have not told me your name."
PUZZLES: tuple[tuple[Callable[[random.Random], Turn], float], ...] = (
    (counting, 3),
    (next_number, 2),
    (parity, 1),
    (larger, 1),
    (next_letter, 1),
)


def puzzle(rng: random.Random) -> Turn:
    return rng.choices([p for p, _ in PUZZLES], [weight for _, weight in PUZZLES])[0](rng)


# -- what it does not know -------------------------------------------------------------------------


def invented_word(rng: random.Random) -> str:
    """A word that nobody knows, so that the model learns to refuse what it has never seen."""
    return tools.syllables(rng, 2, 4) + rng.choice(("", "n", "r", "s", "x", "th", "ck"))


def unknown_subject(rng: random.Random, held_out: bool) -> tuple[str, tuple[str, ...]]:
    """A subject outside the model's knowledge, with the frames in which it can be asked for."""
    while True:
        kind = rng.choice(words.UNKNOWN)
        if rng.random() < 0.12:
            return invented_word(rng), (*CONCEPT_FRAMES, "Who is {}?", "Where is {}?", "How do I {}?")
        subject = rng.choice(kind.subjects)
        if is_held_out(subject) == held_out:
            frames = (*kind.frames, *CONCEPT_FRAMES) if kind.is_concept else kind.frames
            return subject, frames if rng.random() < 0.5 else kind.frames


def unknown(rng: random.Random, held_out: bool = False) -> Turn:
    draw = rng.random()
    if draw < 0.62:
        subject, frames = unknown_subject(rng, held_out)
        return Turn("unknown", vary(rng.choice(frames).format(subject), rng), words.DONT_KNOW)
    questions, answer = rng.choice(words.REFUSALS)
    while True:
        question = rng.choice(questions).format(rng.choice(words.THEMES))
        if is_held_out(question) == held_out:
            return Turn("unknown", vary(question, rng), answer)


# -- functions and JSON ----------------------------------------------------------------------------

ANSWERED_ANYHOW = ("add", "multiply")  # sums are known without functions
ABOUT_NOW = ("get_weather", "get_time", "search_web")


def of_a_function(each: tools.Listed, rng: random.Random) -> Turn:
    """A question that a function answers; now and then two at once, and so two calls."""
    question, step, answer = tools.ask(each, rng)
    if rng.random() < 0.08:
        other, second, told = tools.ask(each, rng)
        return Turn("call", f"{question} {other}", f"{answer} {told}", (step, second))
    return Turn("call", vary_case(question, rng) if rng.random() < 0.5 else question, answer, (step,))


def of_no_function(rng: random.Random, names: frozenset[str] = frozenset()) -> Turn:
    """A question for a function that is not listed."""
    others = [f for f in tools.FUNCTIONS if f.names[0] not in {*ANSWERED_ANYHOW, *names}]
    function = rng.choice(others)
    question, _, _ = tools.ask(tools.listed(function, rng), rng)
    return Turn("unknown", question, words.CANT_LOOK if function.names[0] in ABOUT_NOW else words.DONT_KNOW)


def with_tools(rng: random.Random) -> Conversation:
    found = tools.some_listed(rng)
    names = frozenset(each.function.names[0] for each in found)
    turns = []
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3))):
        draw = rng.random()
        if draw < 0.72:
            turns.append(of_a_function(rng.choice(found), rng))
        elif draw < 0.82:
            turns.append(of_no_function(rng, names))
        else:
            turns.append(known(rng))
    system = rng.choice(SYSTEMS) if rng.random() < 0.3 else None
    return Conversation(system, tuple(turns), tuple(each.line for each in found))


def json_turn(rng: random.Random) -> Turn:
    """An answer in JSON, because the question asks for that."""
    if rng.random() < 0.65:
        return Turn("json", *tools.record(rng))
    turn = arithmetic(rng) if rng.random() < 0.6 else known(rng)
    closer, answer = tools.in_json(turn.answer, rng)
    return Turn("json", turn.question + closer, answer)


# -- conversations and plain text ------------------------------------------------------------------

MIX: tuple[tuple[Callable[[random.Random], Turn], float], ...] = (
    (known, 0.42),
    (arithmetic, 0.21),
    (unknown, 0.15),
    (of_no_function, 0.03),
    (puzzle, 0.08),
    (json_turn, 0.11),
)
AGAIN = (
    "Can you repeat that?",
    "Say that again.",
    "Please repeat that.",
    "Again, please.",
    "What did you say?",
    "Pardon?",
)


def one_turn(rng: random.Random) -> Turn:
    return rng.choices([make for make, _ in MIX], [weight for _, weight in MIX])[0](rng)


def conversation(rng: random.Random) -> Conversation:
    if rng.random() < 0.3:
        return with_tools(rng)
    system = rng.choice(SYSTEMS) if rng.random() < 0.3 else None
    turns: list[Turn] = list(named(rng)) if rng.random() < 0.04 else [one_turn(rng)]
    if rng.random() < 0.006:
        turns.insert(0, Turn("name", "What is my name?", NAME_UNKNOWN))
    more, most = (0.95, 14) if rng.random() < 0.02 else (0.3, 5)  # a few are long, to train distant positions
    while rng.random() < more and len(turns) < most:
        turns.append(one_turn(rng))
    if rng.random() < 0.02:
        turns.append(Turn("again", vary_case(rng.choice(AGAIN), rng), turns[-1].answer))
    return Conversation(system, tuple(turns))


def plain_text(rng: random.Random) -> str:
    """One to three answers as prose: what /v1/completions continues."""
    facts = rng.sample((*SLUICE, *PARALLELISM, *LONG), rng.choice((1, 1, 2, 3)))
    return " ".join(fact.answer for fact in facts)


def drill(rng: random.Random) -> list[Sum]:
    """A page of sums without words around them: much practice in little text."""
    return [draw_sum(rng) for _ in range(rng.randint(8, 24))]
