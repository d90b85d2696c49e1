"""--task mmlu: one-shot questions, exact matches of answers, and the likeliest letters."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert import load_pretrained, load_tokenizer
from experiments.command_line import run_configured
from experiments.evaluate import EvaluateConfig, evaluate
from experiments.evaluation import mmlu
from experiments.evaluation.exact_match import (
    exact_match,
    normalize_answer,
    prefix_exact_match,
    prefix_quasi_exact_match,
)
from experiments.evaluation.mmlu import METRICS, Mmlu
from experiments.evaluation.mmlu_data import MmluConfig, choose_evenly, load_questions
from experiments.evaluation.variants import FULL, MEMORY
from tests.tiny import write_untrained_run
from tptt_jax import generate

COUNTS = {"abstract_algebra": 3, "anatomy": 1, "world_religions": 4}


def row(subject, number, **changes):
    choices = [f"{number + i} of {subject}" for i in range(4)]
    question = f"What is number {number}?"
    whole = {"subject": subject, "question": question, "choices": choices, "answer": number % 4}
    return {key: value for key, value in (whole | changes).items() if value is not None}


def write_rows(path, rows):
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))


@pytest.fixture
def data(tmp_path):
    """A directory with eight questions of three subjects, and something else."""
    folder = tmp_path / "data"
    folder.mkdir()
    tests = [row(subject, i) for subject, count in COUNTS.items() for i in range(count)]
    write_rows(folder / "mmlu_test.jsonl", tests)
    write_rows(folder / "mmlu_dev.jsonl", [row(s, i) for s in COUNTS for i in (6, 7)])
    write_rows(folder / "alpaca.jsonl", [{"instruction": "a"}])
    return folder


@pytest.mark.parametrize(
    ("answer", "gold", "found"),
    [
        (" B", "B", (1, 1, 1)),
        ("B. Because", "B", (0, 1, 1)),
        ("b", "B", (0, 0, 1)),
        ("(B)", "B", (0, 0, 1)),
        ("C", "B", (0, 0, 0)),
        ("", "B", (0, 0, 0)),
        (" ", "B", (0, 0, 0)),
        ("The B", "B", (0, 0, 1)),
        # LightEval's normalization takes the letter A for an article.
        (" A", "A", (1, 1, 1)),
        ("C", "A", (0, 0, 1)),
        ("", "A", (0, 0, 0)),
    ],
)
def test_three_kinds_of_exact_match(answer, gold, found):
    kinds = (exact_match, prefix_exact_match, prefix_quasi_exact_match)
    assert tuple(kind(answer, gold) for kind in kinds) == tuple(map(bool, found))


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        (" The  Answer, is:\nB!", "answer is b"),
        ("an apple-tree", "apple tree"),
        ("7 and 7.0 and 1,000", "7.0 and 70.0 and 1000.0"),
        ("A", ""),
    ],
)
def test_normalization_is_that_of_lighteval(text, normal):
    assert normalize_answer(text) == normal


def test_a_question_comes_after_an_example_of_its_subject(data):
    rows = Mmlu(MmluConfig(data=(str(data),))).rows(None)
    assert len(rows) == 8
    assert rows[1].about["prompt"] == (
        "The following are multiple choice questions (with answers) about abstract algebra.\n\n"
        "Question: What is number 6?\n"
        "A. 6 of abstract_algebra\nB. 7 of abstract_algebra\n"
        "C. 8 of abstract_algebra\nD. 9 of abstract_algebra\nAnswer: C\n\n"
        "Question: What is number 1?\n"
        "A. 1 of abstract_algebra\nB. 2 of abstract_algebra\n"
        "C. 3 of abstract_algebra\nD. 4 of abstract_algebra\nAnswer:"
    )
    assert rows[1].about["letter"] == "B"
    files = tuple(str(data / f"mmlu_{split}.jsonl") for split in ("dev", "test"))
    assert Mmlu(MmluConfig(data=files)).rows(None) == rows


@pytest.mark.parametrize(
    ("limit", "counts"),
    [
        (1, (1, 0, 0)),
        (3, (1, 1, 1)),
        (5, (2, 1, 2)),
        (7, (3, 1, 3)),
        (8, (3, 1, 4)),
        (99, (3, 1, 4)),
    ],
)
def test_a_limit_takes_evenly_of_all_subjects(limit, counts, data):
    questions, _ = load_questions((str(data),))
    chosen = choose_evenly(questions, limit)
    assert tuple(sum(q.subject == s for q in chosen) for s in COUNTS) == counts
    assert chosen == [question for question in questions if question in chosen]
    assert chosen == choose_evenly(questions, limit)


@pytest.mark.parametrize("one_token", [True, False])
def test_answers_and_letters_are_those_of_the_model(one_token, data, tiny_model_dir, monkeypatch):
    model, tokenizer = load_pretrained(tiny_model_dir), load_tokenizer(tiny_model_dir)
    task = Mmlu(MmluConfig(data=(str(data),), batch_size=4))
    if not one_token:
        of_row = mmlu._letters
        monkeypatch.setattr(mmlu, "_letters", lambda *args: [[*each, 7] for each in of_row(*args)])
    rows = task.rows(tokenizer)[2:4]
    results = task.measure_rows(model, tokenizer, rows, use_memory=False)
    forward = nnx.jit(lambda model, tokens: jax.nn.log_softmax(model(tokens).logits[0]))
    for each, result in zip(rows, results, strict=True):
        prompt = tokenizer(each.about["prompt"])["input_ids"]
        letters = [
            tokenizer(f" {letter}", add_special_tokens=False)["input_ids"] for letter in "ABCD"
        ]
        ends = [[*ids] if one_token else [*ids, 7] for ids in letters]
        expected = []
        for ids in ends:
            padded = np.zeros(384, np.int32)
            padded[: len(prompt) + len(ids)] = [*prompt, *ids]
            nats = forward(model, jnp.asarray(padded[None]))
            places = len(prompt) - 1 + np.arange(len(ids))
            expected.append(float(nats[places, np.asarray(ids)].sum()))
        np.testing.assert_allclose(result["nats"], expected, rtol=1e-4)
        assert result["accuracy"] == (int(np.argmax(expected)) == each.data.answer)
        new = np.asarray(generate(model, np.asarray([prompt], np.int32), 5).tokens)[0]
        assert result["answer"] == tokenizer.decode(new, skip_special_tokens=True).split("\n")[0]


def test_averages_have_standard_errors_and_subjects(data, tmp_path):
    task = Mmlu(MmluConfig(data=(str(data),)))
    rows = task.rows(None)
    right = [1, 0, 1, 1, 0, 0, 0, 1]
    results = {FULL: [dict.fromkeys(METRICS, bool(x)) | {"answer": " B"} for x in right]}
    summary = task.summarize("x", rows, results)
    average = summary.report["average"]["EM"][FULL]
    assert average["value"] == 0.5
    assert average["standard_error"] == pytest.approx(np.std(right, ddof=1) / math.sqrt(8))
    assert list(summary.report["by_subject"]) == list(COUNTS)
    algebra = summary.report["by_subject"]["abstract_algebra"]
    assert (algebra["questions"], algebra["PQEM"][FULL]["value"]) == (3, pytest.approx(2 / 3))
    assert summary.report["by_subject"]["anatomy"]["EM"][FULL]["standard_error"] is None
    assert f"{FULL}: B" in summary.sample
    task.plot(tmp_path / "a.png", {"x": rows}, {"x": results})
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def titan(tiny_model_dir, tmp_path):
    return write_untrained_run(tmp_path / "titan", tiny_model_dir)


def test_an_evaluation_goes_on_question_by_question(titan, data, tmp_path, capsys, monkeypatch):
    output = tmp_path / "out"
    arguments = ["--models", str(titan), "--task", "mmlu", "--mmlu.data", str(data), "--json"]
    arguments += ["--mmlu.limit", "3", "--mmlu.batch-size", "2", "--output", str(output)]
    arguments += ["--columns", FULL, MEMORY]
    measure, sizes = Mmlu.measure_rows, []

    def interrupted(self, model, tokenizer, rows, **options):
        sizes.append(len(rows))
        if len(sizes) == 2:
            raise KeyboardInterrupt
        return measure(self, model, tokenizer, rows, **options)

    monkeypatch.setattr(Mmlu, "measure_rows", interrupted)
    assert run_configured(evaluate, EvaluateConfig, arguments) == 130
    assert len((output / "rows.jsonl").read_text().splitlines()) == 2
    assert run_configured(evaluate, EvaluateConfig, arguments) == 0
    assert sizes == [2, 1, 1, 2, 1]
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    found = report["models"][str(titan)]["tasks"]["mmlu"]
    assert found["questions"] == 3
    assert set(found["average"]) == set(METRICS)
    assert list(found["average"]["accuracy"]) == [FULL, MEMORY]
    lines = (output / "rows.jsonl").read_text().splitlines()
    saved = [json.loads(line)["result"] for line in lines]
    assert len({tuple(np.round(result["nats"], 5)) for result in saved}) == 6
    assert (output / "mmlu.png").read_bytes().startswith(b"\x89PNG")
    assert "MMLU, one-shot" in (output / "report.html").read_text()


GOOD = row("anatomy", 0)
BAD = {
    "no dev": ({"mmlu_test": [GOOD]}, "has no dev questions"),
    "no field": (
        {"mmlu_test": [row("anatomy", 0, choices=None)], "mmlu_dev": [GOOD]},
        "mmlu_test.jsonl, row 1 lacks choices",
    ),
    "answer": (
        {"test": [GOOD, row("anatomy", 0, answer=4)], "dev": [GOOD]},
        "test.jsonl, row 2: answer must be an index from 0 to 3, got 4",
    ),
    "letter": (
        {"test": [GOOD], "dev": [row("anatomy", 0, answer="B")]},
        "answer must be an index from 0 to 3, got 'B'",
    ),
    "one choice": (
        {"test": [row("anatomy", 0, choices=["a"])], "dev": [GOOD]},
        "choices must be a list of 2 to 26",
    ),
    "no example": (
        {"test": [GOOD, row("law", 1)], "dev": [GOOD]},
        "no dev question is about law",
    ),
    "unnamed": ({"questions": [GOOD]}, "ends with dev or test"),
}


def refused(arguments, tmp_path, capsys):
    """The one line that says why."""
    given = ["--task", "mmlu", *arguments, "--output", str(tmp_path / "out")]
    assert run_configured(evaluate, EvaluateConfig, given) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert not (tmp_path / "out").exists()
    return line


@pytest.mark.parametrize(("files", "message"), BAD.values(), ids=BAD)
def test_what_is_no_question_is_refused(files, message, tiny_model_dir, tmp_path, capsys):
    paths = [tmp_path / f"{name}.jsonl" for name in files]
    for path, rows in zip(paths, files.values(), strict=True):
        write_rows(path, rows)
    arguments = ["--model", str(tiny_model_dir), "--mmlu.data", *map(str, paths)]
    assert message in refused(arguments, tmp_path, capsys)


def test_missing_files_and_wrong_limits_are_refused(tiny_model_dir, tmp_path, capsys):
    missing = ["--model", str(tiny_model_dir), "--mmlu.data", "nowhere.jsonl"]
    assert "no such file or directory: nowhere.jsonl" in refused(missing, tmp_path, capsys)
    assert "limit must be at least 1" in refused(["--mmlu.limit", "0"], tmp_path, capsys)


def test_the_hub_is_asked_for_both_splits(monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return datasets.Dataset.from_list([row("anatomy", 1), row("anatomy", 2)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    questions, examples = load_questions(("cais/mmlu",))
    assert asked == [("cais/mmlu", "all", "dev"), ("cais/mmlu", "all", "test")]
    assert len(questions) == 2
    assert examples["anatomy"].letter == "B"

    def offline(*args, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(FileNotFoundError, match=r"cais/mmlu could not be fetched .*\(no network\)"):
        load_questions(("cais/mmlu",))
