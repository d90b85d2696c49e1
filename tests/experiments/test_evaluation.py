"""Tasks of experiments.evaluate, the ways a model is run in, resuming, and the report."""

import dataclasses
import json
import math
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from flax import nnx
from rich.table import Table

from experiments.command_line import run_configured
from experiments.data import DataConfig
from experiments.evaluate import EvaluateConfig, evaluate
from experiments.evaluation import associative, needles, perplexity
from experiments.evaluation.associative import AssociativeRecall
from experiments.evaluation.blocks import Blocks, difference
from experiments.evaluation.likelihood import Continuation, score_continuations
from experiments.evaluation.needles import NEEDLES, Needles
from experiments.evaluation.perplexity import BLOCK, Perplexity, haystack_tokens
from experiments.evaluation.seen_text import note_seen_text
from experiments.evaluation.shares import percent
from experiments.evaluation.store import RowStore, row_key
from experiments.evaluation.task import Row
from experiments.evaluation.variants import (
    ALONE,
    EQUAL,
    FULL,
    MEMORY,
    Source,
    equal_window,
    variants_of,
)
from experiments.reports.html import Section, write_report
from experiments.training import FinetuneConfig
from experiments.training.outcome import held_out_flags
from tests.contracts import logits_of, random_tokens, relative_error
from tests.tiny import BOS, make_tokenizer, write_untrained_run
from tptt_jax import CausalLM, LizaConfig, ModelConfig, state_bytes
from tptt_jax.inference.score import token_losses
from tptt_jax.model import replace_memory

TINY = ModelConfig.tiny(num_layers=2)
F32 = jnp.dtype("float32")


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(begin=True)


@pytest.mark.parametrize(
    ("liza", "want"),
    [
        (None, [(FULL, None, False)]),
        (LizaConfig(), [(FULL, None, False)]),
        (LizaConfig(writes="none", softmax_window=9), [(FULL, None, False), (ALONE, 9, False)]),
        (LizaConfig(writes="all"), [(FULL, None, False), (MEMORY, None, True)]),
        (LizaConfig(writes="all", softmax=False), [(MEMORY, None, True)]),
    ],
    ids=["base", "idle", "window", "beside", "linear"],
)
def test_the_ways_of_a_model(liza, want):
    found = variants_of(TINY, liza, F32)
    assert [(v.name, v.window, v.use_memory) for v in found] == want


def test_a_titan_is_held_against_a_window_of_its_bytes():
    found = variants_of(TINY, LizaConfig(softmax_window=9), F32)
    assert [v.name for v in found] == [FULL, ALONE, EQUAL, MEMORY]
    assert [v.use_memory for v in found] == [False, False, False, True]
    # A matrix of D x D floats is worth D / 2 tokens of keys and values in float32, D in bfloat16.
    assert found[2].window == 9 + TINY.head_dim // 2
    assert equal_window(TINY, LizaConfig(softmax_window=9), jnp.dtype("bfloat16")) == (
        9 + TINY.head_dim
    )


@pytest.mark.parametrize("window", [1, 5, 64, 700])
def test_no_narrower_window_has_so_many_bytes(window):
    config = ModelConfig.tiny(
        num_layers=3, layer_kinds=("sliding", "full", "sliding"), sliding_window=4
    )
    liza = LizaConfig(softmax_window=window)

    def size(setting):
        return state_bytes(config, setting, dtype=F32)

    wider = equal_window(config, liza, F32)
    sizes = [size(LizaConfig(writes="none", softmax_window=wider - i)) for i in (0, 1)]
    assert sizes[1] < size(liza) <= sizes[0]


def test_the_controls_of_a_hybrid_keep_its_full_layers(tiny_model_dir, tmp_path):
    """Or else the memory would be given what the full layers do."""
    run = write_untrained_run(tmp_path, tiny_model_dir, full_layers=(1,))
    source, tokens = Source(None, run), random_tokens((1, 60), vocab_size=500)
    hybrid = source.load(None, None, F32).model
    kinds = {variant.name: variant for variant in variants_of(hybrid.config, hybrid.liza, F32)}
    assert list(kinds) == [FULL, ALONE, EQUAL, MEMORY]

    def logits(name):
        variant = kinds[name]
        full = variant.window is None
        model = source.load(variant.window, None, F32, is_full=full).model
        return logits_of(model, tokens, use_memory=variant.use_memory)

    def direct(window, layers):
        liza = LizaConfig(writes="none", softmax_window=window, softmax_sinks=2, full_layers=layers)
        return logits_of(replace_memory(hybrid, liza), tokens, use_memory=False)

    # In bytes of each layer with a window: 16 tokens, and a state of D x D for each KV head.
    assert kinds[EQUAL].window == 16 + hybrid.config.head_dim // 2
    for name in (ALONE, EQUAL):
        want = direct(kinds[name].window, (1,))
        np.testing.assert_array_equal(logits(name), want)
        assert relative_error(direct(kinds[name].window, ()), want) > 1e-3
    base = replace_memory(hybrid, None)
    np.testing.assert_array_equal(logits(FULL), logits_of(base, tokens, use_memory=False))
    for length in (0, 5_000):
        sizes = [
            state_bytes(hybrid.config, liza, max_tokens=length, dtype=F32)
            for liza in (
                hybrid.liza,
                dataclasses.replace(hybrid.liza, writes="none", softmax_window=kinds[EQUAL].window),
            )
        ]
        assert sizes[0] == sizes[1]


def test_a_store_keeps_whole_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    store = RowStore(path)
    key = row_key(task="a", row={"length": 3})
    assert key != row_key(task="a", row={"length": 4})
    assert store.get(key) is None
    store.add(key, {"right": 1.0})
    with path.open("a") as file:
        file.write('{"key": "cut o')
    again = RowStore(path)
    assert again.get(key) == {"right": 1.0}
    again.add("other", {"right": 0.0})
    assert len(path.read_text().splitlines()) == 2
    assert RowStore(path).get("other") == {"right": 0.0}


@pytest.mark.parametrize("length", [2, 63, 65, 200])
def test_perplexity_of_a_text_is_that_of_its_losses(length, tmp_path, tokenizer):
    text = tmp_path / "text.txt"
    text.write_text("The with statement is a statement.\nIt ends.\n" * 60)
    task = Perplexity(DataConfig(path=str(text)), length)
    model = CausalLM(ModelConfig.tiny(num_layers=1, vocab_size=500), rngs=nnx.Rngs(0))
    (row,) = task.rows(tokenizer)
    assert len(row.data) == length
    assert row.data[0] == BOS
    result = task.measure(model, tokenizer, row, use_memory=False)
    losses = np.concatenate([*token_losses(model, [row.data])])
    assert result["counts"] == [
        min(BLOCK, length - start) - (start == 0) for start in range(0, length, BLOCK)
    ]
    np.testing.assert_allclose(sum(result["nats"]), losses.sum(), rtol=1e-6)
    report = task.summarize("tiny", [row], {FULL: [result]}).report
    np.testing.assert_allclose(report["perplexity"][FULL], np.exp(losses.mean()), rtol=1e-6)
    assert report["tokens"] == length - 1
    assert report["by_position"][-1]["to"] >= length
    assert "recovered_gap" not in report


def test_rows_of_a_text_are_read_each_from_its_beginning(tmp_path, tokenizer):
    text = tmp_path / "text.txt"
    text.write_text("The with statement is a statement.\nIt ends.\n" * 60)
    data = DataConfig(path=str(text))
    model = CausalLM(ModelConfig.tiny(num_layers=1, vocab_size=500), rngs=nnx.Rngs(0))
    (whole,) = Perplexity(data, 200).rows(tokenizer)
    task = Perplexity(data, 200, row_tokens=70)
    rows = task.rows(tokenizer)
    assert [len(row.data) for row in rows] == [70, 70, 62]
    assert {row.data[0] for row in rows} == {BOS}
    np.testing.assert_array_equal(np.concatenate([row.data[1:] for row in rows]), whole.data[1:])
    results = [task.measure(model, tokenizer, row, use_memory=False) for row in rows]
    losses = np.concatenate([x for row in rows for x in token_losses(model, [row.data])])
    report = task.summarize("tiny", rows, {FULL: results}).report
    np.testing.assert_allclose(report["perplexity"][FULL], np.exp(losses.mean()), rtol=1e-6)
    assert report["tokens"] == 199
    assert report["by_position"][-1]["to"] <= 128
    with pytest.raises(ValueError, match="rows of 1 tokens have nothing to predict"):
        Perplexity(data, 200, row_tokens=1).rows(tokenizer)
    table = tmp_path / "rows.jsonl"
    table.write_text('{"text": "row"}\n' * 9)
    with pytest.raises(ValueError, match=r"is a table: set --data\.eval-length"):
        Perplexity(DataConfig(path=str(table)), 200, row_tokens=70).rows(tokenizer)


def test_perplexity_of_a_table_is_that_of_the_rows_held_out(tmp_path, tokenizer):
    table = tmp_path / "rows.jsonl"
    rows = [{"text": f"row {i} of a table, " * (3 + i)} for i in range(6)]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(path=str(table), sequence_length=64, eval_rows=2, packing=False)
    task = Perplexity(data, 10_000)
    model = CausalLM(ModelConfig.tiny(num_layers=1, vocab_size=500), rngs=nnx.Rngs(0))
    found = task.rows(tokenizer)
    assert len(found) >= 2
    assert len(Perplexity(data, 70).rows(tokenizer)) < len(found)
    total = count = 0.0
    for row in found:
        result = task.measure(model, tokenizer, row, use_memory=False)
        tokens = row.data.tokens[row.data.segment_ids != 0]
        total += np.concatenate([*token_losses(model, [tokens])]).sum()
        count += len(tokens) - 1
        assert sum(result["counts"]) == len(tokens) - 1
    results = [task.measure(model, tokenizer, row, use_memory=False) for row in found]
    report = task.summarize("tiny", found, {FULL: results}).report
    np.testing.assert_allclose(report["perplexity"][FULL], np.exp(total / count), rtol=1e-5)


def test_the_recovered_gap_and_its_error():
    task = Perplexity(DataConfig(), 1000)
    rng = np.random.default_rng(0)
    counts = np.full(40, 64.0)
    full = rng.normal(200, 20, 40)
    lost = rng.uniform(5, 15, 40)
    back = 0.6 * lost + rng.normal(0, 1, 40)

    def result(nats):
        return [{"nats": nats.tolist(), "counts": counts.tolist()}]

    results = {FULL: result(full), ALONE: result(full + lost), MEMORY: result(full + lost - back)}
    report = task.summarize("x", [], results).report
    gap = report["recovered_gap"]
    np.testing.assert_allclose(gap[MEMORY]["value"], back.sum() / lost.sum())
    # Errors are those of the differences, not of the losses, which vary ten times as much.
    assert 0.5 < gap[MEMORY]["error"] / (math.sqrt(40) / lost.sum()) < 2
    assert (
        task.summarize("x", [], results | {ALONE: result(full)})
        .report.keys()
        .isdisjoint({"recovered_gap"})
    )


def test_columns_that_lack_rows_have_no_gap():
    part = {"nats": [1.0, 2.0], "counts": [1.0, 1.0]}
    results = {FULL: [part], ALONE: [part, part], MEMORY: [part, part]}
    assert "recovered_gap" not in Perplexity(DataConfig(), 9).summarize("x", [], results).report


def needles_of(name, **changes):
    settings = {"lengths": (300,), "depths": (0.0, 0.5, 1.0), "samples": 2} | changes
    return Needles(name, DataConfig(), **settings)


def test_haystacks_and_prompts_begin_once(tmp_path, tokenizer, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("<s><s>The with statement is a statement.\n")
    data = DataConfig(path=str(text))
    expected = tokenizer("The with statement is a statement.\n")["input_ids"]
    assert haystack_tokens(data, tokenizer).tolist() == expected
    # The text is shorter than the prompts, which repeat it.
    for row in Needles("passkey", data, (300,), (0.0, 1.0), 1).rows(tokenizer):
        assert row.data[0].tolist().count(BOS) == 1
    monkeypatch.setattr(perplexity, "python_docs_text", text.read_text)
    assert haystack_tokens(DataConfig(), tokenizer).tolist() == expected


@pytest.mark.parametrize("name", NEEDLES)
def test_what_is_hidden_is_in_the_prompt_and_asked_for(name, tokenizer):
    rows = needles_of(name).rows(tokenizer)
    assert len(rows) == 6
    places = []
    for row in rows:
        prompt, probe, right = row.data
        assert len(prompt) == row.about["length"] == 300
        assert prompt[0] == BOS
        whole = tokenizer.decode(prompt)
        assert whole.endswith(probe.question.strip())
        assert all(sentence.strip() in whole for sentence in probe.hidden)
        hidden = " ".join(probe.hidden)
        assert all(each in hidden for each in right)
        assert not any(each in probe.question for each in right)
        places.append(whole.index(probe.hidden[0].strip()))
        if name == "variable-tracking":
            starts = [whole.index(sentence.strip()) for sentence in probe.hidden]
            assert starts == sorted(starts)
    assert places[0] < places[2] < places[4]
    assert len({row.data[2] for row in rows}) == len(rows)


@pytest.mark.parametrize("name", NEEDLES)
@pytest.mark.parametrize("kind", ["all", "one", "none", "next line"])
def test_what_an_answer_names_counts(name, kind, tokenizer, monkeypatch):
    task = needles_of(name)
    row = task.rows(tokenizer)[0]
    right = row.data[2]
    named = {"all": right, "one": right[:1], "none": (), "next line": ()}[kind]
    text = " " + ", ".join(named) + ("\n" + right[0] if kind == "next line" else "")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]

    def answer(model, prompts, count, *, use_memory):
        assert prompts.shape == (1, 300)
        assert use_memory is True
        return SimpleNamespace(tokens=np.array([ids], int), lengths=[len(ids)])

    monkeypatch.setattr(needles, "generate", answer)
    result = task.measure(None, tokenizer, row, use_memory=True)
    assert result["right"] == len(named) / len(right)


def test_maps_tell_lengths_depths_and_gaps_apart(tmp_path, tokenizer):
    task = needles_of("passkey", lengths=(200, 300), depths=(0.0, 1.0), samples=1)
    rows = task.rows(tokenizer)
    results = [{"right": float(i == 2), "answer": str(i)} for i in range(3)]
    found = task._map(rows, results)
    np.testing.assert_array_equal(found, [[0, 100], [0, np.nan]])
    summary = task.summarize("x", rows, {FULL: results})
    assert summary.report["by_length"][1] == {"length": 300, "right": {FULL: 1.0}}
    assert f"{FULL}: 0" in summary.sample
    task.plot(tmp_path / "a.png", {"x": rows}, {"x": {FULL: results, MEMORY: []}})
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("wrong", [(), (0,), (0, 3)])
def test_recall_asks_for_pairs_of_the_row(wrong, tokenizer, monkeypatch):
    task = AssociativeRecall((400,), 2)
    rows = task.rows(tokenizer)
    assert len(rows) == 2
    tokens, count, places = rows[0].data
    assert count <= len(tokens) == 400
    lines = tokenizer.decode(tokens[:count], skip_special_tokens=True).strip().split("\n")
    pairs = [tuple(line.strip() for line in each.split("=")) for each in lines]
    assert len(pairs) == rows[0].about["pairs"] + 8
    assert set(pairs[-8:]) <= set(pairs[:-8])
    assert len(set(pairs)) == rows[0].about["pairs"]
    answers = [tokenizer.decode(tokens[a:b]).strip() for a, b in places]
    assert answers == [value for _, value in pairs[-8:]]

    def likeliest(model, given, valid, flat, *, use_memory):
        assert int(valid.sum()) == count
        found = np.asarray(given)[0, np.asarray(flat)].copy()
        for index in wrong:
            found[np.asarray(flat) == places[index][0]] += 1
        return found

    monkeypatch.setattr(associative, "_likeliest", likeliest)
    model = SimpleNamespace(config=ModelConfig.tiny(vocab_size=500))
    result = task.measure(model, tokenizer, rows[0], use_memory=True)
    assert result == {"right": 1 - len(wrong) / 8}


def test_likeliest_tokens_are_those_of_the_logits():
    model = CausalLM(TINY, rngs=nnx.Rngs(0))
    tokens = random_tokens((1, 12))
    places = jnp.array([3, 7, 11, 0])
    got = associative._likeliest(
        model, jnp.asarray(tokens), jnp.ones((1, 12), jnp.int32), places, use_memory=False
    )
    want = logits_of(model, tokens)[0].argmax(-1)
    np.testing.assert_array_equal(got[:3], want[np.array([2, 6, 10])])


def test_shares_have_standard_errors():
    assert percent([]) == ""
    assert percent([0.5]) == "50"
    assert percent([1.0, 0.0, 1.0, 0.0]) == "50 ± 29"


def test_a_report_needs_nothing_else(tmp_path):
    table = Table(title="a & b")
    table.add_column("<name>")
    table.add_row("x [1]")
    png = tmp_path / "a.png"
    png.write_bytes(b"\x89PNG")
    section = Section("task", [table], ["hidden: <b>", ""], png)
    write_report(tmp_path / "r.html", "T", [section], {"Command": "python <x>"})
    page = (tmp_path / "r.html").read_text()
    assert "&lt;name&gt;" in page
    assert "a &amp; b" in page
    assert "hidden: &lt;b&gt;" in page
    assert "python &lt;x&gt;" in page
    assert 'src="data:image/png;base64,iVBORw==' in page
    assert "http" not in page
    assert page.count("<pre>") == 2


@pytest.fixture(scope="module")
def titan(tiny_model_dir, tmp_path_factory):
    return write_untrained_run(tmp_path_factory.mktemp("titan"), tiny_model_dir)


ARGUMENTS = ["--task", "perplexity", "passkey", "recall", "--tokens", "300", "--samples", "1"]
ARGUMENTS += ["--lengths", "400", "--depths", "0", "--json"]


def test_all_ways_of_a_run_and_of_its_base_side_by_side(
    titan, tiny_model_dir, tmp_path, capsys, monkeypatch
):
    output = tmp_path / "out"
    arguments = ["--models", str(titan), str(tiny_model_dir), *ARGUMENTS, "--output", str(output)]
    measure, calls = Perplexity.measure, []

    def interrupted(self, *args, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(self, *args, **options)

    monkeypatch.setattr(Perplexity, "measure", interrupted)
    assert run_configured(evaluate, EvaluateConfig, arguments) == 130
    kept = len((output / "rows.jsonl").read_text().splitlines())
    assert kept == 6
    assert run_configured(evaluate, EvaluateConfig, arguments) == 0
    # Two were measured before the stop, one was stopped, and three columns were left.
    assert len(calls) == 6
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report.pop("peak_gb") > 0
    saved = json.loads((output / "results.json").read_text())
    # The file has more for model cards: the command, and tables of texts.
    assert saved.pop("command").startswith("python -m experiments.evaluate")
    for model in saved["models"].values():
        (table,) = model.pop("tables")["perplexity"]
        assert table["rows"][-1][0] in ("all", "of the window's loss recovered")
        assert len(table["columns"]) == len(table["rows"][0])
    assert report == saved
    tuned, base = (report["models"][str(path)] for path in (titan, tiny_model_dir))
    assert tuned["windows"] == {FULL: None, ALONE: 16, EQUAL: 24, MEMORY: 16}
    assert base["windows"] == {FULL: None}
    found = tuned["tasks"]["perplexity"]["perplexity"]
    assert found[FULL] == pytest.approx(base["tasks"]["perplexity"]["perplexity"][FULL], rel=1e-5)
    assert len({round(value, 4) for value in found.values()}) == 4
    for name in ("perplexity", "passkey", "recall"):
        assert (output / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    page = (output / "report.html").read_text()
    # An overview of each model, and a picture of each task.
    assert page.count("data:image/png;base64") == 5
    for name in ("overview.png", "overview-2.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG")
    assert "The pass key is" in page
    # Nothing is measured again, unless the model is another.
    assert run_configured(evaluate, EvaluateConfig, arguments) == 0
    assert len(calls) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "a", "--model", "b"], "--models names all models"),
        (["--tokens", "1"], "tokens must be at least 2"),
        (["--samples", "0"], "samples must be at least 1"),
        (["--depths", "1.5"], "depths must lie between 0 and 1"),
        (["--task", "chess"], "--task"),
        (["--task", "passkey", "--lengths", "20"], "raise --lengths to"),
        (["--task", "recall", "--lengths", "50"], "give longer --lengths"),
        (["--task", "recall", "--lengths", "300000"], "give shorter --lengths"),
        (["--lengths", "64", "64", "32"], "lengths names 64 twice"),
        (["--models", "a", "b", "a"], "models names a twice"),
        (["--sinks", "-1"], "sinks must be at least 0"),
        (["--columns", "memory on", "--no-liza"], "--columns names no other"),
        (["--columns", "memory on"], "none of the columns memory on, only full softmax"),
        (["--data", "missing.txt"], "missing.txt"),
        (["--data", "EMPTY"], "nothing can be predicted"),
        (["--task", "needle", "--data", "EMPTY"], "is empty: name a text to hide it in"),
        (["--task", "passkey", "--data", "missing.txt"], "no such file: missing.txt"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, message, tiny_model_dir, tmp_path, capsys):
    empty = tmp_path / "empty.txt"
    empty.touch()
    arguments = [str(empty) if each == "EMPTY" else each for each in arguments]
    given = [*arguments, "--output", str(tmp_path / "out")]
    if "--models" not in arguments:
        given += ["--model", str(tiny_model_dir)]
    assert run_configured(evaluate, EvaluateConfig, given) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_sinks_alone_change_every_window(tiny_model_dir, tmp_path):
    """Or else the window of equal bytes has other sinks than what it is compared with."""
    source = Source(None, write_untrained_run(tmp_path, tiny_model_dir))
    windows = [source.load(window, 1, F32).model.liza for window in (None, 9)]
    assert [(each.softmax_window, each.softmax_sinks) for each in windows] == [(16, 1), (9, 1)]
    # Full softmax sees every token.
    assert source.load(None, 1, F32, is_full=True).model.liza.softmax_window is None
    assert Source(str(tiny_model_dir)).load(None, 1, F32).model.liza is None


def test_a_model_whose_layers_all_have_windows_has_no_wider_one():
    config = ModelConfig.tiny(num_layers=2, layer_kinds=("sliding",) * 2, sliding_window=8)
    liza = LizaConfig(writes="all", softmax_window=16)
    assert equal_window(config, liza, F32) is None
    assert [variant.name for variant in variants_of(config, liza, F32)] == [FULL, ALONE, MEMORY]


def test_results_belong_to_the_weights_and_to_the_text(tiny_model_dir, tmp_path, capsys):
    """A report in the run's folder changes nothing; other text or weights are measured anew."""
    run, text = write_untrained_run(tmp_path, tiny_model_dir), tmp_path / "text.txt"
    output = run / "evaluation"
    given = ["--models", str(run), "--data", str(text), "--output", str(output), "--json"]

    def measured():
        assert run_configured(evaluate, EvaluateConfig, [*given, "--columns", MEMORY]) == 0
        (report,) = json.loads(capsys.readouterr().out.splitlines()[-1])["models"].values()
        lines = (output / "rows.jsonl").read_text().splitlines()
        return len(lines), report["tasks"]["perplexity"]["perplexity"][MEMORY]

    text.write_text("The with statement is a statement.\n" * 9)
    first = measured()
    assert first[0] == 1
    assert measured() == first
    text.write_text("It is the end of a statement.\n" * 9)
    other = measured()
    assert other[0] == 2
    assert other[1] != pytest.approx(first[1])
    stamp = Source(None, run).stamp
    (run / "checkpoint.json").touch()
    assert Source(None, run).stamp != stamp
    assert Source("another", run).settings == {"base": "another"}


def test_errors_of_short_and_of_equal_texts(tmp_path):
    """Unknown errors are not shown, and equal results differ by 0 +- 0."""
    short = Blocks.of([{"nats": [9.0], "counts": [4.0]}])
    assert short.perplexity(0, None).text() == f"{math.exp(9 / 4):.2f}"
    long = Blocks.of([{"nats": [9.0, 8.0], "counts": [4.0, 4.0]}])
    assert difference(long, long) == (0.0, 0.0)
    assert difference(long, long).text("+.3f") == "+0.000 ± 0.000"
    result = {"nats": [9.0], "counts": [4.0]}
    found = {FULL: [result], ALONE: [{"nats": [12.0], "counts": [4.0]}], MEMORY: [result]}
    table = Perplexity(DataConfig(), 9).summarize("x", [], found).table
    assert "nan" not in json.dumps([list(column.cells) for column in table.columns])


def test_texts_longer_than_the_learned_positions_are_refused(tokenizer):
    config = ModelConfig.tiny(position_embedding="learned", max_positions=300, vocab_size=500)
    model = CausalLM(config, rngs=nnx.Rngs(0))
    task = AssociativeRecall((400,), 1)
    with pytest.raises(ValueError, match="lower --lengths to 300"):
        task.measure(model, tokenizer, task.rows(tokenizer)[0], use_memory=False)
    settings = {"batch_size": 1, "use_memory": False}
    with pytest.raises(ValueError, match="lower the maximum length"):
        score_continuations(model, [Continuation([1], [2])], max_length=400, **settings)
    few = CausalLM(ModelConfig.tiny(vocab_size=5), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="ids 0 to 4, got 7"):
        score_continuations(few, [Continuation([1], [7])], max_length=9, **settings)
    with pytest.raises(ValueError, match="ids 0 to 4, got 7"):
        list(token_losses(few, [np.array([1, 7])]))


def test_what_a_run_has_seen_is_named(tmp_path):
    text = tmp_path / "text.txt"
    text.touch()
    run = tmp_path / "run"
    run.mkdir()

    def note(path, tokens=100, seed=0, **saved):
        settings = {"seed": 3, "data": {"path": str(path), "eval_tokens": 50, "eval_rows": 9}}
        (run / "config.yaml").write_text(yaml.safe_dump(settings))
        return note_seen_text(run, DataConfig(path=str(path), **saved), tokens, seed)

    assert "all but the first 50 tokens, which --tokens 50 measures alone" in note(text)
    assert note(text, tokens=50) is None
    table = tmp_path / "rows.jsonl"
    assert "for those give --seed 3 and give --data.eval-rows 9" in note(table)
    assert note(table, seed=3, eval_rows=9) is None
    (run / "config.yaml").write_text("data: {path: other.txt}")
    assert note_seen_text(run, DataConfig(path=str(text)), 100, 0) is None


def test_a_run_ends_with_the_flags_of_its_held_out_rows(tmp_path):
    text, table = tmp_path / "my text.txt", tmp_path / "rows.jsonl"
    text.touch()

    def flags(path, seed=0, **data):
        return held_out_flags(FinetuneConfig(data=DataConfig(path=str(path), **data), seed=seed))

    assert flags("python-docs", seed=1) == " --tokens 2000"
    assert flags(text, eval_tokens=70) == f" --data '{text}' --tokens 70"
    assert flags(text, eval_tokens=0) == f" --data '{text}'"
    assert flags(table) == f" --data {table}"
    assert flags(table, loss="all") == f" --data {table} --data.loss all"
    given = flags(table, seed=3, eval_rows=7.0, columns=("text=a",))
    assert given == f" --data {table} --data.columns text=a --data.eval-rows 7.0 --seed 3"


def test_rows_say_what_decides_them(tokenizer):
    for task in (needles_of("passkey"), AssociativeRecall((400,), 2), Perplexity(DataConfig(), 9)):
        rows = task.rows(tokenizer)
        assert len({row_key(row=row.about) for row in rows}) == len(rows)
        assert all(isinstance(row, Row) for row in rows)
