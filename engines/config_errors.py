"""What is wrong with a configuration: every problem at once, each with its place and its remedy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake. `where` is "FILE:LINE" (or "command line"), `key` a dotted path, empty for the file."""

    where: str
    key: str
    wrong: str
    allowed: str = ""
    nearest: str = ""
    remedy: str = ""

    def __str__(self) -> str:
        parts = [f"{self.where}: {self.key + ': ' if self.key else ''}{self.wrong}"]
        if self.nearest:
            parts.append(f"did you mean {self.nearest!r}?")
        if self.allowed:
            parts.append(f"allowed: {self.allowed}")
        if self.remedy:
            parts.append(f"remedy: {self.remedy}")
        return "; ".join(parts)


class ConfigError(ValueError):
    """A configuration that says something wrong. `problems` holds all that was found, in file order."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems: Sequence[Problem] = tuple(problems)
        super().__init__("\n".join(map(str, self.problems)))


ALIKE, A_SLIP = 0.6, 0.85  # how much of two words agrees: worth a hint, or hardly meant to differ


def nearest(word: str, words: Iterable[str], cutoff: float = ALIKE) -> str:
    """The word of `words` that was probably meant, case aside, or an empty string."""
    by_fold = {w.casefold(): w for w in words}
    match = get_close_matches(word.casefold(), by_fold, n=1, cutoff=cutoff)
    return by_fold[match[0]] if match else ""
