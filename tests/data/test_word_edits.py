import hashlib

import pytest

from moe_mtl.data import DataError, is_text, load
from moe_mtl.data.word_edits import EDITS, PRETRAINING, TAGS


def test_the_edits():
    answers = {edit: EDITS[edit]("bananaz") for edit in EDITS}
    assert answers == {
        "reverse": "zananab",
        "sort": "aaabnnz",
        "rot13": "onananm",
        "drop-vowels": "bnnz",
        "swap-halves": "anazban",
        "next-letter": "cboboba",
    }
    assert {name: PRETRAINING[name]("word") for name in PRETRAINING} == {
        "copy": "word",
        "double": "wordword",
        "first-three": "wor",
    }


def test_words_are_on_one_side_each():
    splits = load("word-edits")
    assert is_text("word-edits")
    assert not is_text("digits")
    words = {name: {e.prompt.split(":")[1] for e in part} for name, part in splits.parts().items()}
    assert not words["train"] & words["test"]
    assert not words["train"] & words["validation"]
    assert sum(map(len, words.values())) == 2217
    assert splits.info["rows"] == {"train": 10416, "validation": 1374, "test": 1512}
    # A hash of the word alone decides: by hand, for one of each.
    for name, digits in (("test", {0}), ("validation", {1}), ("train", set(range(2, 10)))):
        word = sorted(words[name])[0].removesuffix("=")
        assert int(hashlib.sha256(word.encode()).hexdigest()[:8], 16) % 10 in digits


def test_every_word_has_every_task_and_only_the_tag_differs():
    splits = load("word-edits")
    assert splits.tasks == list(EDITS)
    first = splits.train[: len(EDITS)]
    assert [e.task for e in first] == list(EDITS)
    assert len({e.prompt[1:] for e in first}) == 1
    assert [e.prompt[0] for e in first] == [TAGS[e.task] for e in first]
    without = load("word-edits", tags=False)
    assert {e.prompt[0] for e in without.train} == {":"}
    assert len({e.prompt for e in without.train}) * len(EDITS) == len(without.train)


def test_the_base_learns_none_of_the_edits():
    splits = load("word-edits", edits=list(PRETRAINING))
    assert not {e.prompt[0] for e in splits.train} & {TAGS[edit] for edit in EDITS}


@pytest.mark.parametrize(
    ("edits", "message"),
    [(["revers"], "unknown edit 'revers'; known: reverse"), ([], "different edits"), (["sort", "sort"], "different")],
)
def test_wrong_edits(edits, message):
    with pytest.raises(DataError, match=message):
        load("word-edits", edits=edits)
