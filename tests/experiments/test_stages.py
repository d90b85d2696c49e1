"""The stages of a run in this process: fitted, distilled, trained, stopped in the middle."""

import contextlib
import io
import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

from convert import load_pretrained
from experiments.data import DataConfig
from experiments.data.packing import Example, pack_examples
from experiments.finetune import finetune
from experiments.training import FinetuneConfig
from experiments.training.config import CheckpointConfig, FitConfig, OptimizerConfig
from experiments.training.evaluation import HeldOut, evaluate_held_out, recovered_gap
from experiments.training.fitting import Fitting, fit_memory
from experiments.training.metrics import read_metrics
from experiments.training.outcome import Outcome
from experiments.training.prepare import prepare_run
from experiments.training.report import TrainingProgress
from experiments.training.windows import WindowRange
from tests.contracts import logits_of, random_tokens
from tests.experiments.shared_steps import STEP_MAKERS, share_steps
from tptt_jax import CausalLM, LizaConfig, ModelConfig
from tptt_jax.layers.parameters import MemoryParam
from tptt_jax.training.checkpoint import restore_trainable
from tptt_jax.training.fit import FitMetrics
from tptt_jax.training.partition import split_trainable
from tptt_jax.training.train_step import Batch, StepMetrics

FIT = FitConfig(steps=12, distill_steps=6, length=64, learning_rate=0.01)
STATES = ["before", "window", "fitted", "after", "memory_off"]


@pytest.fixture(scope="module", autouse=True)
def shared_steps():
    with share_steps():
        yield


@pytest.fixture(scope="module")
def config(tiny_model_dir, tmp_path_factory):
    """Two rows to fit on, the same in every step, so that what is left of the gap must fall."""
    text = tmp_path_factory.mktemp("text") / "fit.txt"
    words = np.random.default_rng(0).choice(["a state", "is read", "with", "two", "keys"], 200)
    text.write_text(" ".join(words)[:500])
    return FinetuneConfig(
        model=str(tiny_model_dir),
        data=DataConfig(sequence_length=64, eval_tokens=150),
        liza=LizaConfig(softmax_window=8, softmax_sinks=2),
        fit=replace(FIT, data=str(text)),
        steps=3,
        # Held-out rows are longer than those of the training, which is all that this model learns.
        horizon_auto=False,
        optimizer=OptimizerConfig(learning_rate=1e-2),
        checkpoints=CheckpointConfig(checkpoint_every=100),
        sample_tokens=0,
    )


def printed_run(config: FinetuneConfig) -> tuple[dict, str]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        report = finetune(config)
    return report, out.getvalue()


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """A run that nobody disturbed, its report and what it printed."""
    config = replace(config, output=tmp_path_factory.mktemp("runs") / "whole")
    return config, *printed_run(config)


def losses(output: Path) -> dict[str, list[float]]:
    files = {name: output / name / "metrics.jsonl" for name in ("transfer", "distill", ".")}
    return {
        name: [record.loss for record in read_metrics(file)] if file.exists() else []
        for name, file in files.items()
    }


def values(model: CausalLM) -> dict[tuple, np.ndarray]:
    return {
        path: np.asarray(variable.get_value())
        for path, variable in nnx.to_flat_state(nnx.state(model))
        if not jnp.issubdtype(variable.get_value().dtype, jax.dtypes.prng_key)
    }


def trained(config: FinetuneConfig) -> dict[str, np.ndarray]:
    model = load_pretrained(config.model, config.memory, config.adapters)
    restore_trainable(config.output, model)
    return split_trainable(model, config.train)[1]


def test_every_stage_does_what_it_is_for(whole):
    config, report, _ = whole
    found = losses(config.output)
    assert {name: len(each) for name, each in found.items()} == {
        **{"transfer": 12, "distill": 6, ".": 3}
    }
    assert found["transfer"][-1] < 0.8 * found["transfer"][0]
    assert found["distill"][-1] < found["distill"][0]
    gaps = [record.gap_left for record in read_metrics(config.output / "transfer/metrics.jsonl")]
    assert all(gap is not None and len(gap) == ModelConfig.tiny().num_layers for gap in gaps)
    assert report["perplexity_after"] < report["perplexity_fitted"]
    # Every stage measures the memory at its end.
    shares = []
    for name in ("transfer", "distill", "."):
        *_, last = read_metrics(config.output / name / "metrics.jsonl")
        assert last.memory is not None
        assert last.memory["layer"] == [0, 1, 2]
        shares.append(np.mean(last.memory["share"]))
    assert min(shares) > 0
    page = (config.output / "report.html").read_text(encoding="utf-8")
    assert "gap left by attention transfer" in page
    assert page.count("data:image/png") == 3


def test_the_measurements_are_kept_and_shown(whole):
    config, report, stdout = whole
    saved = json.loads((config.output / "evaluation.json").read_text())
    assert list(saved) == STATES
    measured = {
        name: HeldOut(np.array(s["nats"]), np.array(s["counts"])) for name, s in saved.items()
    }
    for name, found in measured.items():
        assert report[f"perplexity_{name}"] == pytest.approx(found.perplexity)
        assert found.counts.sum() == config.data.eval_tokens
        assert f"{found.perplexity:.2f}" in stdout
    loss = {name: found.loss for name, found in measured.items()}
    for name in ("fitted", "after"):
        expected = recovered_gap(loss["before"], loss["window"], loss[name])
        assert report.get(f"recovered_gap_{name}") == expected
    # A window changes nothing for the tokens that still see everything.
    seen = slice(0, config.liza.softmax_window + 1)
    for name in ("window", "fitted"):
        np.testing.assert_allclose(
            measured[name].nats[seen], measured["before"].nats[seen], rtol=1e-4
        )
    assert not np.allclose(measured["window"].nats, measured["before"].nats, rtol=1e-4)


def test_fitting_changes_the_memory_alone(config, tmp_path):
    job = prepare_run(replace(config, output=tmp_path / "run"), Console(file=io.StringIO()))
    before = values(job.model)
    fit_memory(job)
    of_memory = nnx.to_flat_state(nnx.split(job.model, MemoryParam, ...)[1])
    memory = {path for path, _ in of_memory}
    changed = {path for path, new in values(job.model).items() if (new != before[path]).any()}
    assert changed
    assert changed <= memory
    assert memory - changed <= {path for path in memory if path[-1] == "dropout"}


def stop_at(title: str, step: int, monkeypatch) -> None:
    """As if Ctrl-C were pressed during a step."""
    update = TrainingProgress.update

    def pressing(self, record):
        if (self._title, record.step) == (title, step):
            os.kill(os.getpid(), signal.SIGINT)
        update(self, record)

    monkeypatch.setattr(TrainingProgress, "update", pressing)


@pytest.fixture(scope="module")
def fitted(config, whole, tmp_path_factory):
    """The same run without its last stage."""
    only = replace(config, output=tmp_path_factory.mktemp("runs") / "fitted", steps=0)
    return only, *printed_run(only)


@pytest.mark.parametrize(
    ("title", "step"),
    [("attention transfer", 12), ("distillation", 2)],
    ids=["after the transfer", "within the distillation"],
)
def test_a_fit_resumes_where_it_was_stopped(title, step, fitted, tmp_path, monkeypatch):
    """Within the transfer as well: tests of the command kill it there."""
    config, report, _ = fitted
    stopped = replace(config, output=tmp_path / "run")
    monkeypatch.setattr(Outcome, "plot", lambda self: None)
    with monkeypatch.context() as patch:
        stop_at(title, step, patch)
        with pytest.raises(KeyboardInterrupt):
            printed_run(stopped)
    assert "fitted" not in json.loads((stopped.output / "evaluation.json").read_text())
    again, stdout = printed_run(stopped)
    assert f"{title}: resuming after {step} of" in stdout
    assert losses(stopped.output) == losses(config.output)
    assert again["perplexity_fitted"] == report["perplexity_fitted"]
    first, second = trained(config), trained(stopped)
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_a_finished_run_repeats_nothing(whole):
    config, report, _ = whole
    before = (config.output / "evaluation.json").read_bytes()
    again, _ = printed_run(config)
    assert "fit_seconds" not in again
    assert again["resumed_at"] == 3
    assert again["perplexity_after"] == report["perplexity_after"]
    assert (config.output / "evaluation.json").read_bytes() == before


def test_a_run_may_only_fit(fitted, whole):
    """What later commands load is then the memory as it was fitted."""
    config, report, stdout = fitted
    assert report["perplexity_fitted"] == whole[1]["perplexity_fitted"]
    assert list(json.loads((config.output / "evaluation.json").read_text())) == STATES[:3]
    assert "after training" not in stdout
    loaded = load_pretrained(config.output)
    tokens = random_tokens((1, 40), vocab_size=loaded.config.vocab_size)
    again = load_pretrained(config.model, config.memory, config.adapters)
    without = logits_of(again, tokens)
    restore_trainable(config.output, again)
    np.testing.assert_array_equal(logits_of(loaded, tokens), logits_of(again, tokens))
    assert not np.allclose(logits_of(loaded, tokens), without, atol=1e-3)


def test_a_fit_goes_on_from_a_memory_that_was_fitted_before(fitted, tmp_path):
    first, _, _ = fitted
    longer = replace(first.fit, steps=0, distill_steps=1, length=80)
    second = replace(first, model=str(first.output), output=tmp_path / "run", fit=longer)
    job = prepare_run(second, Console(file=io.StringIO()))
    start = Fitting.of(job).start_transfer().trainable
    known = trained(first)
    for name, value in start.items():
        if name.endswith(".mag.limit"):
            # Longer rows: more tokens may count.
            assert (value > known[name]).all()
        else:
            np.testing.assert_array_equal(value, known[name])


def test_a_memory_can_be_fitted_to_a_model_that_was_tuned_before(config, tmp_path):
    tuned = replace(config, output=tmp_path / "tuned", liza=LizaConfig(), no_liza=True)
    first, _ = printed_run(tuned)
    fitted = replace(config, model=str(tuned.output), output=tmp_path / "fitted", steps=0)
    second, _ = printed_run(fitted)
    assert second["perplexity_before"] == pytest.approx(first["perplexity_after"], rel=1e-5)
    assert second["perplexity_before"] != pytest.approx(first["perplexity_before"], rel=1e-3)
    assert losses(fitted.output)["distill"][-1] < losses(fitted.output)["distill"][0]
    kept, new = trained(tuned), trained(fitted)
    assert all(np.array_equal(kept[name], new[name]) for name in kept)


def test_a_window_alone_has_no_memory_to_fit(whole, tmp_path):
    config, report, _ = whole
    alone = replace(config, output=tmp_path / "run", no_liza=True, steps=1)
    found, stdout = printed_run(alone)
    saved = json.loads((alone.output / "evaluation.json").read_text())
    assert list(saved) == ["before", "window", "after"]
    assert found["perplexity_window"] == pytest.approx(report["perplexity_window"], rel=1e-4)
    assert "fit_seconds" not in found
    assert not (alone.output / "transfer").exists()
    assert "memory is idle" not in stdout
    assert not any(".memory." in name or ".mag." in name for name in trained(alone))


@pytest.mark.parametrize("no_liza", [False, True])
def test_an_idle_memory_is_said_in_one_line(no_liza, config, tmp_path):
    out = io.StringIO()
    idle = replace(config, output=tmp_path / "run", liza=LizaConfig(), no_liza=no_liza)
    job = prepare_run(idle, Console(file=out, soft_wrap=True))
    notices = [line for line in out.getvalue().splitlines() if "the memory is idle" in line]
    assert len(notices) == (0 if no_liza else 1)
    assert all("--liza.softmax-window" in line and "--no-liza" in line for line in notices)
    assert job.fit_rows is None


def test_with_full_softmax_a_titan_trains_as_lora_alone_does(config, tmp_path):
    runs = [
        replace(config, output=tmp_path / str(no_liza), liza=LizaConfig(), no_liza=no_liza)
        for no_liza in (False, True)
    ]
    reports = [printed_run(each)[0] for each in runs]
    titan, alone = (losses(each.output)["."] for each in runs)
    assert len(titan) == 3
    np.testing.assert_allclose(titan, alone, rtol=1e-6)
    found = [report["perplexity_after"] for report in reports]
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    kept, want = map(trained, runs)
    for name, value in want.items():
        np.testing.assert_allclose(kept[name], value, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(("changes", "count"), [({}, 1), ({"steps": 0}, 0), ({"recall": True}, 0)])
def test_rows_that_fit_the_window_are_named(changes, count, config, tmp_path):
    """A run that trains on nothing else leaves the memory as the fit made it."""
    length = config.liza.softmax_window
    data = replace(config.data, sequence_length=length)
    if changes.pop("recall", False):
        kinds = {"recall_trains": "memory", "recall_kinds": ("passkey",)}
        data = replace(data, recall=0.5, recall_length=200, **kinds)
    short = replace(config, output=tmp_path / "run", data=data, **changes)
    out = io.StringIO()
    prepare_run(short, Console(file=out, soft_wrap=True))
    assert out.getvalue().count(f"rows of {length} tokens fit the window of {length}") == count


def test_rows_to_fit_on_that_stay_in_the_window(config, tmp_path):
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"text": "short"}\n' * 40)
    fit = replace(config.fit, data=str(lines))
    short = replace(config, output=tmp_path / "run", fit=fit)
    job = prepare_run(short, Console(file=io.StringIO()))
    with pytest.raises(ValueError, match="no token leaves the window"):
        fit_memory(job)


def test_bad_rows_to_fit_on_are_counted_and_named(config, tmp_path):
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"text": "short"}\n{"text": 5}\n' * 12)
    fit = replace(config.fit, data=str(lines))
    config = replace(config, output=tmp_path / "run", fit=fit)
    out = io.StringIO()
    prepare_run(config, Console(file=out, soft_wrap=True))
    assert "12 bad rows left out of those to fit on\n" in out.getvalue()
    named = [line for line in out.getvalue().splitlines() if line.startswith("left out: ")]
    expected = f"left out: {lines}, row 2: text must be text, got int"
    assert named[0].startswith(expected)
    assert len(named) == 10
    with pytest.raises(ValueError, match=r"row 2: text must be text, got int"):
        prepare_run(replace(config, strict=True), Console(file=out))


def test_rows_to_fit_on_come_from_their_own_text(config, tmp_path):
    job = prepare_run(replace(config, output=tmp_path / "run"), Console(file=io.StringIO()))
    assert job.fit_rows is not None
    text = "".join(job.tokenizer.batch_decode(job.fit_rows.tokens, skip_special_tokens=True))
    assert Path(config.fit.data).read_text().startswith(text.strip()[:100]) is False
    assert text.strip() in Path(config.fit.data).read_text()
    assert job.fit_rows.loss_mask.any(axis=1).all()


def test_settings_of_the_training_data_are_not_those_of_other_data_to_fit_on(config, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"body": f"word {n} " * 60}) + "\n" for n in range(8)))
    asked = {"path": str(rows), "columns": ("text=body",), "format": "text"}
    data = replace(config.data, **asked, split="train[2:]", max_rows=5, eval_rows=0)
    job = prepare_run(
        replace(config, output=tmp_path / "run", data=data), Console(file=io.StringIO())
    )
    assert job.fit_rows is not None
    text = "".join(job.tokenizer.batch_decode(job.fit_rows.tokens, skip_special_tokens=True))
    assert text.strip() in Path(config.fit.data).read_text()


@pytest.mark.parametrize(
    ("length", "window", "trained", "expected"),
    [(None, 8, 64, 256), (None, 64, 64, 512), (None, 512, 64, 2048), (None, 8, 4096, 4096)],
)
def test_how_long_rows_to_fit_on_are(length, window, trained, expected):
    assert FitConfig(length=length).row_length(window, trained) == expected
    assert FitConfig(length=window + 1).row_length(window, trained) == window + 1


def test_windows_are_drawn_between_their_bounds():
    windows = WindowRange.checked((4, 64), 64)
    assert windows is not None
    drawn = [int(windows.draw(0, "train", step)) for step in range(600)]
    assert (min(drawn), max(drawn)) == (4, 64)
    # As many below the geometric mean as above it.
    assert 250 < sum(window < 16 for window in drawn) < 350
    assert drawn == [int(windows.draw(0, "train", step)) for step in range(600)]
    for other in ((1, "train"), (0, "distill")):
        assert drawn[:20] != [int(windows.draw(*other, step)) for step in range(20)]


@pytest.mark.parametrize("bounds", [None, (2, 8)], ids=["one window", "a range"])
def test_every_stage_draws_its_windows(bounds, config, tmp_path, monkeypatch):
    seen = []

    def made(partition, optimizer, **options):
        gap_left = jnp.ones(3)
        metrics = FitMetrics(gap_left) if not options else StepMetrics(*jnp.ones(6))

        def step(state, frozen, *inputs):
            # Training takes rows for the memory alone after the window.
            seen.append(inputs[1] if options else inputs[-1])
            return state, metrics

        return step

    for module, name in STEP_MAKERS:
        monkeypatch.setattr(module, name, made)
    monkeypatch.setattr(Outcome, "plot", lambda self: None)
    data = replace(config.data, eval_tokens=0)
    printed_run(replace(config, output=tmp_path / "run", window_range=bounds, data=data))
    assert len(seen) == 12 + 6 + 3
    if bounds is None:
        assert seen == [None] * len(seen)
        return
    for windows in (seen[:12], seen[12:18], seen[18:]):
        assert all(bounds[0] <= window <= bounds[1] for window in windows)
        assert len(set(map(int, windows))) > 1


def test_held_out_losses_by_place():
    model = CausalLM(ModelConfig.tiny(num_layers=1), rngs=nnx.Rngs(0))
    lengths = (9, 7, 12, 3)
    examples = [Example(random_tokens((n,), n), np.arange(n) > (n == 12) * 4) for n in lengths]
    source = pack_examples(examples, 16)
    found = evaluate_held_out(
        model, source, lambda rows: Batch(*map(jnp.asarray, rows)), batch_size=2
    )
    nats, counts = np.zeros(16), np.zeros(16)
    for tokens, ids, mask in zip(source.tokens, source.segment_ids, source.loss_mask, strict=True):
        for document in set(ids.tolist()) - {0}:
            places = np.flatnonzero(ids == document)
            logits = logits_of(model, tokens[None, places])[0]
            lost = -np.asarray(jax.nn.log_softmax(logits))
            for t in range(1, len(places)):
                if mask[places[t]]:
                    nats[places[t]] += lost[t - 1, tokens[places[t]]]
                    counts[places[t]] += 1
    np.testing.assert_array_equal(found.counts, counts)
    np.testing.assert_allclose(found.nats, nats, rtol=1e-4)
    assert found.loss == pytest.approx(nats.sum() / counts.sum(), rel=1e-4)


def test_what_a_fit_recovers_is_measured_in_nats():
    assert recovered_gap(1.0, 3.0, 1.5) == pytest.approx(0.75)
    assert recovered_gap(1.0, 1.0, 2.0) is None
    assert recovered_gap(2.0, 1.0, 1.0) is None
