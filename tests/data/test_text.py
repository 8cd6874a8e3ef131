import numpy as np
import pytest
import torch
from transformers import ByT5Tokenizer

from moe_mtl.data import DataError
from moe_mtl.data.text import IGNORED, Example, TextSplits, collate, encode, prompt_tokens

TEMPLATE = (
    "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
EXAMPLES = [Example("b", "ab=", "xyz"), Example("a", "c=", "u")]


@pytest.fixture
def tokenizer():
    return ByT5Tokenizer(extra_ids=0)


def text_of(tokenizer, ids):
    return tokenizer.decode([i for i in ids if i > 2])


def test_an_example_is_its_prompt_its_answer_and_an_end(tokenizer):
    table = encode(EXAMPLES, tokenizer, ["a", "b"])
    assert len(table) == 2
    assert table.task.tolist() == [1, 0]
    ids = table.ids(0).tolist()
    assert text_of(tokenizer, ids) == "ab=xyz"
    assert ids.count(tokenizer.eos_token_id) == 1
    assert ids[-1] == tokenizer.eos_token_id
    assert table.prompt_length(0) == 3
    assert table.length(0) == 7
    assert table[0] == {"input_ids": ids, "labels": [IGNORED] * 3 + ids[3:], "tasks": [1] * 7}


def test_nothing_is_asked_for_that_nothing_comes_before(tokenizer):
    (first, *rest) = encode([Example("a", "", "xy")], tokenizer, ["a"])[0]["labels"]
    assert first == IGNORED
    assert IGNORED not in rest


def test_a_batch_is_padded(tokenizer):
    table = encode(EXAMPLES, tokenizer, ["a", "b"])
    batch = collate([table[0], table[1]], pad=0)
    assert batch["input_ids"].shape == (2, 7)
    assert batch["attention_mask"].sum(1).tolist() == [7, 4]
    assert batch["labels"][1, 4:].tolist() == [IGNORED] * 3
    assert batch["input_ids"][1, 4:].tolist() == [0] * 3
    assert batch["tasks"].tolist() == [1, 0]


def test_packed_samples_have_positions_and_tasks_per_token(tokenizer):
    table = encode(EXAMPLES, tokenizer, ["a", "b"])
    one, two = table[0], table[1]
    packed = {key: one[key] + two[key] for key in one} | {"seq_lengths": [7, 4]}
    batch = collate([packed, {**two, "seq_lengths": [4]}], pad=0)
    assert batch["tasks"][0].tolist() == [1] * 7 + [0] * 4
    assert batch["position_ids"].tolist() == [[*range(7), *range(4)], [*range(4), *range(7)]]
    assert "attention_mask" not in batch


def test_batches_hold_every_example_once_the_longest_first(tokenizer):
    table = encode([Example("a", "x" * n, "y") for n in (3, 9, 1, 5, 7)], tokenizer, ["a"])
    batches = list(table.batches(2, pad=0))
    assert sorted(torch.cat([batch["rows"] for batch in batches]).tolist()) == [0, 1, 2, 3, 4]
    assert [batch["input_ids"].shape[1] for batch in batches] == [11, 7, 3]


def test_too_long_an_example_is_refused_or_cut(tokenizer):
    with pytest.raises(
        DataError, match=r"row 0: expected at most 5 tokens \(max_length\), found 7 tokens, 3 of them prompt"
    ):
        encode(EXAMPLES, tokenizer, ["a", "b"], max_length=5)
    table = encode(EXAMPLES, tokenizer, ["a", "b"], max_length=5, truncate=True)
    assert table.length(0) == 5
    assert table.length(1) == 4
    with pytest.raises(DataError, match="3 of them prompt"):
        encode(EXAMPLES, tokenizer, ["a", "b"], max_length=3, truncate=True)


def test_messages_go_through_the_chat_template(tokenizer):
    tokenizer.chat_template = TEMPLATE
    user, answer = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
    table = encode([Example("a", [user], [answer]), EXAMPLES[1]], tokenizer, ["a"])
    assert text_of(tokenizer, table.ids(0)) == "<u>hi\n<a>yo\n"
    assert text_of(tokenizer, table.ids(0)[: table.prompt_length(0)]) == "<u>hi\n<a>"
    assert text_of(tokenizer, table.ids(1)) == "c=u"
    assert prompt_tokens([user], tokenizer) == table.ids(0)[: table.prompt_length(0)].tolist()


def test_messages_need_a_template_that_does_not_change_what_came_before(tokenizer):
    example = Example("a", [{"role": "user", "content": "hi"}], [{"role": "assistant", "content": "yo"}])
    with pytest.raises(DataError, match=r"row 1: expected a tokenizer with a chat template"):
        encode([EXAMPLES[1], example], tokenizer, ["a"])
    tokenizer.chat_template = "{{ messages | length }}{{ messages[0].content }}"
    with pytest.raises(DataError, match="begins with its prompt"):
        encode([example], tokenizer, ["a"])


def test_a_tokenizer_without_an_end_is_refused(tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="end-of-sequence"):
        encode(EXAMPLES, tokenizer, ["a", "b"])


def test_only_some_tasks():
    splits = TextSplits(EXAMPLES, EXAMPLES[:1], [], ["a", "b"], {"name": "x"})
    only = splits.only(["a"])
    assert only.tasks == ["a"]
    assert only.train == EXAMPLES[1:]
    assert only.validation == []
    assert only.info == {"name": "x", "rows": {"train": 1, "validation": 0, "test": 0}}


def test_no_examples(tokenizer):
    table = encode([], tokenizer, ["a"])
    assert len(table) == 0
    assert list(table.batches(4, 0)) == []
    assert np.asarray(table.task).shape == (0,)
