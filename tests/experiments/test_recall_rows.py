"""Recall rows: the hidden text lies beyond the window; answers count, and text if asked for."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from experiments.data import DataConfig, load_token_data
from experiments.data.packing import Example
from experiments.data.probes import PROBES
from experiments.data.recall_rows import recall_examples
from experiments.training.config import FinetuneConfig
from experiments.training.resume import Resumption
from tests.tiny import BOS, make_tokenizer

LENGTH, WINDOW = 200, 32
QUESTION = re.compile(
    r"\n(?:What is the pass key\? The pass key is"
    r"|What is the magic number of the (\w+)\? The magic number of the \1 is"
    r"|What goes with (\w+)\? \2 goes with)$"
)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(begin=True)


def texts_of(tokenizer, filler=" and") -> list[Example]:
    """Texts of one word, in which every other token counts."""
    tokens = np.array(tokenizer(filler * 20, add_special_tokens=False)["input_ids"])
    return [Example(tokens, np.arange(len(tokens)) % 2 == 1)] * 9


def rows(tokenizer, *, seed=0, count=30, filler=" and", **options):
    texts = texts_of(tokenizer, filler)
    options = {"length": LENGTH, "window": WINDOW} | options
    made = recall_examples(tokenizer, texts, count, seed=seed, **options)
    return [example for (example,) in made]


def parts(tokenizer, row) -> tuple[str, str, np.ndarray]:
    """Prompt, answer, and the prompt's tokens."""
    start = int(np.flatnonzero(row.targets != row.targets[-1])[-1]) + 1
    prompt = row.tokens[:start]
    return tokenizer.decode(prompt), tokenizer.decode(row.tokens[start:]), prompt


def test_every_row_can_be_answered_from_beyond_the_window_alone(tokenizer):
    kinds = set()
    for row in rows(tokenizer):
        assert row.tokens.shape == row.targets.shape == (LENGTH,)
        prompt, answer, tokens = parts(tokenizer, row)
        found = QUESTION.search(prompt)
        assert found is not None, prompt
        word = found[1] or found[2]
        kinds.add("needle" if found[1] else "pairs" if found[2] else "passkey")
        said = {
            "The pass key is": f" The pass key is{answer}",
            "magic": f" The magic number of the {word} is{answer}",
            "goes": f" {word} goes with{answer}",
        }
        (sentence,) = (text for key, text in said.items() if key in found[0])
        assert prompt[: found.start()].count(sentence) == 1
        # The last queries before the answer see this much of the prompt.
        assert answer.endswith(".")
        assert answer[:-1] not in tokenizer.decode(tokens[-WINDOW:])
    assert kinds == set(PROBES)


def test_only_the_answer_has_weight(tokenizer):
    for row in rows(tokenizer, weight=0.5):
        counted = np.flatnonzero(row.targets)
        np.testing.assert_array_equal(counted, np.arange(counted[0], LENGTH))
        assert len(set(row.targets[counted].tolist())) == 1
        # Against a row of text, in which every token weighs 1.
        assert row.targets.sum() == pytest.approx(0.5 * LENGTH)


def test_text_may_have_weight(tokenizer):
    (word,) = set(texts_of(tokenizer)[0].tokens.tolist())
    of_text = 0
    for row in rows(tokenizer, weight=0.5, count_text=True):
        _, _, tokens = parts(tokenizer, row)
        answer = row.targets[len(tokens) :]
        assert len(set(answer.tolist())) == 1
        # Against a row of text, in which every token weighs 1.
        assert answer.sum() == pytest.approx(0.5 * LENGTH)
        counted = np.flatnonzero(row.targets[: len(tokens)])
        if len(counted):
            # Text as it is: every other token counts there, and what is hidden in it does not.
            of_text += 1
            assert set(row.targets[counted].tolist()) == {1.0}
            assert set(tokens[counted].tolist()) == {word}
            assert len(counted) == pytest.approx(np.sum(tokens == word) / 2, abs=4)
        assert row.targets[0] == 0
    assert 8 < of_text < 22


def test_depths_reach_from_the_beginning_to_the_window(tokenizer):
    """Of pass keys, whose sentence is all that is hidden in a text of one word."""
    made = rows(tokenizer, count=180, length=160)[::3]
    prompts = [parts(tokenizer, row)[0] for row in made]
    depths = [prompt.index(" The pass key is") for prompt in prompts]
    ends = [prompt.rindex("is the pass key.") + len("is the pass key.") for prompt in prompts]
    behind = [
        len(tokenizer(prompt[end:], add_special_tokens=False)["input_ids"])
        for prompt, end in zip(prompts, ends, strict=True)
    ]
    assert min(depths) < 20
    assert len(set(depths)) > 20
    assert WINDOW <= min(behind) < WINDOW + 12
    assert max(behind) > 2 * WINDOW


def test_the_seed_decides_and_the_count_does_not(tokenizer):
    first, again, other = (rows(tokenizer, seed=seed) for seed in (3, 3, 4))
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
    assert not any(np.array_equal(a.tokens, b.tokens) for a, b in zip(first, other, strict=True))
    fewer = rows(tokenizer, seed=3, count=7)
    for a, b in zip(fewer, first[:7], strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)


def test_rows_begin_as_the_model_expects(tokenizer):
    for row in rows(tokenizer, prefix=[BOS], count=4):
        assert row.tokens[0] == BOS
        assert len(row.tokens) == LENGTH


def test_a_packed_row_has_questions_of_several_lengths(tokenizer):
    options = {"length": 800, "window": WINDOW, "prefix": [BOS], "packing": True}
    made = recall_examples(tokenizer, texts_of(tokenizer), 40, seed=0, **options)
    sizes = [len(example.tokens) for row in made for example in row]
    for row in made:
        assert sum(len(example.tokens) for example in row) == 800
        # A row's answers weigh what one answer would, each the same.
        weights = [example.targets[len(parts(tokenizer, example)[2]) :].sum() for example in row]
        np.testing.assert_allclose(weights, 0.3 * 800 / len(row), rtol=1e-5)
    for example in made[0] + made[1] + made[2]:
        assert example.tokens[0] == BOS
        prompt, answer, tokens = parts(tokenizer, example)
        assert QUESTION.search(prompt)
        assert answer[:-1] in prompt
        assert answer[:-1] not in tokenizer.decode(tokens[-WINDOW:])
    assert len(sizes) > 2 * len(made)
    assert min(sizes) < 200
    assert max(sizes) > 400
    # As many tokens in every octave: examples of a length are rarer the longer they are.
    assert sum(size < 300 for size in sizes) > 2 * sum(size >= 300 for size in sizes)


def test_haystacks_are_text_pieces_of_it_and_noise(tokenizer):
    text = " and"
    token = int(tokenizer(text, add_special_tokens=False)["input_ids"][0])
    made = rows(tokenizer, count=200)
    noisy = sum(np.mean(row.tokens == token) < 0.2 for row in made)
    assert 25 < noisy < 75
    special = set(tokenizer.all_special_ids)
    assert not any(special & set(row.tokens.tolist()) for row in made)


def test_a_share_of_the_training_rows_is_for_recall(tokenizer):
    config = DataConfig(sequence_length=LENGTH, eval_tokens=500, max_rows=None)
    plain = load_token_data(config, tokenizer, 5, window=WINDOW)
    recall = DataConfig(sequence_length=LENGTH, eval_tokens=500, recall=0.25)
    mixed, again = (load_token_data(recall, tokenizer, 5, window=WINDOW) for _ in range(2))
    rows_of_text = plain.train.num_rows
    assert mixed.train.num_rows == pytest.approx(rows_of_text / 0.75, abs=1)
    np.testing.assert_array_equal(mixed.train.tokens[:rows_of_text], plain.train.tokens)
    np.testing.assert_array_equal(mixed.train.loss_mask[:rows_of_text], plain.train.loss_mask)
    np.testing.assert_array_equal(mixed.train.tokens, again.train.tokens)
    asked = mixed.train.loss_mask[rows_of_text:]
    np.testing.assert_allclose(asked.sum(axis=1), 0.3 * LENGTH, rtol=1e-5)
    # With recall_text every token of text that hides something weighs 1, and rows are the same.
    counted = load_token_data(replace(recall, recall_text=True), tokenizer, 5, window=WINDOW).train
    np.testing.assert_array_equal(counted.tokens, mixed.train.tokens)
    more = counted.loss_mask[rows_of_text:]
    np.testing.assert_array_equal(np.where(more == 1, 0, more), asked)
    assert 0.2 < np.mean(more == 1) < 0.5
    source = mixed.train
    for tokens, ids in zip(
        source.tokens[rows_of_text:], source.segment_ids[rows_of_text:], strict=True
    ):
        for segment in range(1, ids.max() + 1):
            question = tokens[ids == segment].tolist()
            assert question[0] == BOS
            assert question.count(BOS) == 1
            assert re.search(r"\nWhat (is the|goes with)", tokenizer.decode(question))
    # What is held out stays text.
    assert plain.eval is not None
    assert mixed.eval is not None
    np.testing.assert_array_equal(mixed.eval.tokens, plain.eval.tokens)


def test_rows_for_the_memory_alone_stay_apart(tokenizer):
    mixed = DataConfig(sequence_length=LENGTH, eval_tokens=500, recall=0.25)
    apart = replace(mixed, recall_trains="memory")
    whole, found = (load_token_data(c, tokenizer, 5, window=WINDOW) for c in (mixed, apart))
    assert found.asked is not None
    assert whole.asked is None
    rows_of_text = found.train.num_rows
    np.testing.assert_array_equal(found.train.tokens, whole.train.tokens[:rows_of_text])
    np.testing.assert_array_equal(found.asked.tokens, whole.train.tokens[rows_of_text:])
    np.testing.assert_array_equal(found.asked.loss_mask, whole.train.loss_mask[rows_of_text:])
    assert f"{found.asked.num_rows} rows that ask, for the memory alone" in found.describe()


def test_a_resumed_run_compares_the_rows_for_the_memory_alone(tokenizer, tmp_path):
    data = DataConfig(sequence_length=LENGTH, eval_tokens=500, recall=0.25, recall_trains="memory")
    resumption = Resumption(FinetuneConfig(data=data, output=tmp_path / "run"))

    def recorded(seed: int) -> str | None:
        found = load_token_data(data, tokenizer, seed, window=WINDOW)
        resumption.check_loaded(found, None)
        return resumption.record.rows

    # The seed of a whole text decides nothing but what its recall rows ask.
    assert recorded(5) == recorded(5) != recorded(6)


def test_rows_for_the_memory_alone_may_be_longer_than_those_of_text(tokenizer):
    apart = {"recall": 0.25, "recall_trains": "memory", "recall_length": 2 * LENGTH}
    data = DataConfig(sequence_length=LENGTH, eval_tokens=500, **apart)
    found = load_token_data(data, tokenizer, 5, window=WINDOW)
    assert found.asked is not None
    assert found.asked.sequence_length == 2 * LENGTH
    assert found.train.sequence_length == LENGTH
    assert found.asked.num_rows == round(found.train.num_rows / 3)
    with pytest.raises(ValueError, match=r"raise --data\.recall-length to \d+ or more"):
        load_token_data(replace(data, recall_length=40), tokenizer, 5, window=WINDOW)
    with pytest.raises(ValueError, match=r"--data\.recall-length is for rows that train"):
        replace(data, recall_trains="all")


def test_haystacks_may_be_other_texts(tokenizer, tmp_path):
    file = tmp_path / "colours.jsonl"
    texts = ["purple and green " * 60, 3, "green and purple " * 60]
    file.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    plain = DataConfig(sequence_length=LENGTH, eval_tokens=500, recall=0.25, recall_text=True)
    data = replace(plain, recall_haystacks=(str(file),))
    found = load_token_data(data, tokenizer, 5, window=WINDOW, strict=False)
    before = load_token_data(plain, tokenizer, 5, window=WINDOW)
    rows_of_text = round(0.75 * found.train.num_rows)
    asked, mask = (x[rows_of_text:] for x in (found.train.tokens, found.train.loss_mask))
    words = tokenizer("purple and green and purple", add_special_tokens=False)["input_ids"]
    assert set(asked[mask == 1].tolist()) <= {*words, *tokenizer.all_special_ids}
    # Nothing else depends on them.
    np.testing.assert_array_equal(
        found.train.tokens[:rows_of_text], before.train.tokens[:rows_of_text]
    )
    assert [line for line in found.bad_rows if "colours.jsonl" in line and "row 2" in line]
    with pytest.raises(ValueError, match=r"colours\.jsonl, row 2"):
        load_token_data(data, tokenizer, 5, window=WINDOW)
    with pytest.raises(FileNotFoundError, match=r"none\.txt"):
        load_token_data(replace(data, recall_haystacks=("none.txt",)), tokenizer, 5)
    with pytest.raises(ValueError, match=r"add --data\.recall, the share"):
        replace(data, recall=0.0)


@pytest.mark.parametrize(
    ("accumulate", "share", "batches"), [(1, 0.1, 1), (1, 0.5, 1), (4, 0.5, 4), (8, 0.2, 2)]
)
def test_batches_for_the_memory_alone_of_a_step(accumulate, share, batches):
    data = DataConfig(recall=share, recall_trains="memory")
    config = FinetuneConfig(data=data, accumulate=accumulate)
    assert config.asked_batches == batches
    assert replace(config, data=replace(data, recall=0.0)).asked_batches == 0
    assert replace(config, data=replace(data, recall_trains="all")).asked_batches == 0
    with pytest.raises(ValueError, match=r"--data\.recall-trains memory needs a memory to train"):
        replace(config, no_liza=True)


def test_rows_that_are_too_short_say_how_long_they_must_be(tokenizer):
    with pytest.raises(ValueError, match=r"raise --data.sequence-length to \d+ or more") as caught:
        rows(tokenizer, length=60, count=1)
    needed = int(re.search(r"to (\d+) or more", str(caught.value))[1])
    assert len(rows(tokenizer, length=needed, count=1)) == 1


def test_the_kinds_decide_what_is_asked(tokenizer):
    config = DataConfig(
        sequence_length=LENGTH, eval_tokens=500, recall=0.25, recall_kinds=("pairs",)
    )
    asked = load_token_data(config, tokenizer, 5, window=WINDOW).train
    recall = asked.tokens[(asked.loss_mask > 1).any(axis=1)]
    assert len(recall)
    assert all("\nWhat goes with" in tokenizer.decode(tokens) for tokens in recall)
    with pytest.raises(ValueError, match="recall_kinds must name some of passkey, needle, pairs"):
        DataConfig(recall=0.1, recall_kinds=())
