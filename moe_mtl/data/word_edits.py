"""Word edits: one word, several answers. Real words, nothing to download, exact scores.

2,217 words of 4 to 9 letters from the language reference that ships with Python (`pydoc_data.topics`; only the words,
each once, in `words.txt`). All tasks see the same words and differ in a letter before the word alone; with
`tags: false` not even in that, and then only the adapter can know the task. Words, not rows, are dealt to the parts, so
that every tested word is new.
"""

import codecs
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .errors import DataError
from .text import Example, TextSplits

EDITS: dict[str, Callable[[str], str]] = {
    "reverse": lambda word: word[::-1],
    "sort": lambda word: "".join(sorted(word)),
    "rot13": lambda word: codecs.encode(word, "rot13"),
    "drop-vowels": lambda word: "".join(letter for letter in word if letter not in "aeiou"),
    "swap-halves": lambda word: word[len(word) // 2 :] + word[: len(word) // 2],
    "next-letter": lambda word: "".join(chr((ord(letter) - ord("a") + 1) % 26 + ord("a")) for letter in word),
}
# What a base model learns first, so that it can spell: none of these changes a letter.
PRETRAINING: dict[str, Callable[[str], str]] = {
    "copy": lambda word: word,
    "double": lambda word: word + word,
    "first-three": lambda word: word[:3],
}
_ALL = EDITS | PRETRAINING
TAGS = dict(zip(_ALL, "RSOVHNCDF", strict=True))


@dataclass(frozen=True)
class Options:
    """Options of the word edits.

    Attributes:
        edits: which of reverse, sort, rot13, drop-vowels, swap-halves, next-letter; and copy, double, first-three,
            which a base model is trained on.
        tags: whether a prompt says which edit is asked for.
    """

    edits: tuple[str, ...] = tuple(EDITS)
    tags: bool = True


def load(options: Options) -> TextSplits:
    """Prompts like `R:apple=` and completions like `elppa`; 80 / 10 / 10 of the words, by a hash of the word.

    Raises:
        DataError: an unknown edit, none, or one twice.
    """
    edits = list(options.edits)
    if unknown := [edit for edit in edits if edit not in _ALL]:
        raise DataError(f"word-edits: unknown edit {', '.join(map(repr, unknown))}; known: {', '.join(_ALL)}")
    if not edits or len(set(edits)) < len(edits):
        raise DataError(f"word-edits: expected different edits, found {edits}")
    content = (Path(__file__).parent / "words.txt").read_bytes()
    parts: dict[str, list[Example]] = {"train": [], "validation": [], "test": []}
    for word in content.decode().split():
        part = parts[("test", "validation", *["train"] * 8)[_tenth(word)]]
        part += [Example(edit, prompt(edit if options.tags else None, word), _ALL[edit](word)) for edit in edits]
    info = {
        "name": "word-edits",
        "licence": "PSF-2.0",
        "sha256": hashlib.sha256(content).hexdigest(),
        "rows": {name: len(examples) for name, examples in parts.items()},
    }
    return TextSplits(**parts, tasks=edits, info=info)


def prompt(edit: str | None, word: str) -> str:
    """What a model is asked; without an edit, only the word."""
    return f"{'' if edit is None else TAGS[edit]}:{word}="


def _tenth(word: str) -> int:
    return int(hashlib.sha256(word.encode()).hexdigest()[:8], 16) % 10
