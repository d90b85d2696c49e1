from types import SimpleNamespace

import numpy as np
import pytest

from experiments.data import python_docs_text
from experiments.data.packing import Example
from experiments.data.recall_rows import passkey_questions, recall_examples
from experiments.training import questions as module
from experiments.training.questions import Questions
from tests.tiny import BOS, make_tokenizer

LENGTH, WINDOW = 160, 24


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(begin=True)


@pytest.fixture(scope="module")
def haystack(tokenizer):
    return np.array(tokenizer(python_docs_text()[:6000])["input_ids"], np.int32)


@pytest.fixture
def questions(tokenizer, haystack):
    return Questions(tokenizer, haystack, length=LENGTH, window=WINDOW, seed=1)


def test_keys_stand_beyond_the_window(tokenizer, questions):
    assert len({question.answer for question in questions.asked}) == len(questions.asked) == 8
    for question in questions.asked:
        assert len(question.prompt) == LENGTH
        assert question.prompt[0] == BOS
        whole = tokenizer.decode(question.prompt)
        assert question.hidden in whole
        assert question.answer in question.hidden
        assert whole.endswith(question.question)
        assert question.answer.isdigit()
        assert question.answer not in tokenizer.decode(question.prompt[-WINDOW:])


def test_the_seed_decides(tokenizer, haystack, questions):
    def answers(seed):
        made = passkey_questions(
            tokenizer, haystack, 8, length=LENGTH, window=WINDOW, seed=seed, prefix=[BOS]
        )
        return [question.answer for question in made]

    assert answers(1) == [question.answer for question in questions.asked]
    assert answers(2) != answers(1)


def test_no_key_was_trained_on(tokenizer, haystack, questions):
    text = Example(haystack, np.ones(len(haystack), bool))
    made = recall_examples(tokenizer, [text], 60, length=LENGTH, window=WINDOW, seed=1)
    rows = [example for examples in made for example in examples]
    texts = [tokenizer.decode(row.tokens) for row in rows]
    assert not any(question.hidden in text for question in questions.asked for text in texts)


@pytest.mark.parametrize(
    ("change", "right"),
    [
        (lambda key: f" {key}", 8),
        (lambda key: f" {key}. And then", 8),
        (lambda key: f" {key}0", 0),
        (lambda key: f" {key[:-1]}", 0),
        (lambda key: " the key", 0),
        (lambda _: "", 0),
    ],
)
def test_an_answer_is_right_if_its_number_is(monkeypatch, tokenizer, questions, change, right):
    def answer(model, prompts, count, *, use_memory):
        assert prompts.shape == (8, LENGTH)
        assert use_memory is False
        new = [
            tokenizer(change(question.answer), add_special_tokens=False)["input_ids"]
            for question in questions.asked
        ]
        longest = max(map(len, new))
        rows = [row + [0] * (longest - len(row)) for row in new]
        return SimpleNamespace(tokens=np.array(rows, int).reshape(8, -1), lengths=[*map(len, new)])

    monkeypatch.setattr(module, "generate", answer)
    answers = questions.ask(None, use_memory=False)
    assert answers.right == right
    assert answers.texts[0] == change(questions.asked[0].answer).strip()


def test_a_row_without_room_says_how_long_it_must_be(tokenizer, haystack):
    with pytest.raises(ValueError, match=r"raise --data.sequence-length to \d+ or more"):
        Questions(tokenizer, haystack, length=40, window=WINDOW, seed=0)
