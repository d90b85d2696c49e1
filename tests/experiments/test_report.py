import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from rich.console import Console

from experiments.training.metrics import MetricsWriter, StepRecord, read_metrics
from experiments.training.report import TrainingProgress, plot_run


def record(step: int, **changes) -> StepRecord:
    values = {
        "step": step,
        "loss": 3.0 - step / 100,
        "tokens_per_s": 1234.5,
        "learning_rate": 5e-4,
        "grad_norm": 0.7,
        "mu_mean": round(0.05 + step / 1000, 6),
        "mu_min": 0.04,
        "mu_max": round(0.06 + step / 500, 6),
        "seconds": 2.0,
    }
    return StepRecord(**values | changes)


def write_steps(path: Path, steps, **changes) -> None:
    with MetricsWriter(path) as writer:
        for step in steps:
            writer.write(record(step, **changes))


# --- metrics.jsonl ---------------------------------------------------------------------------


def test_each_step_is_one_line_at_once(tmp_path):
    path = tmp_path / "runs" / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write(record(1))
        # Read while the run goes on.
        assert json.loads(path.read_text()) == {
            **{"step": 1, "loss": 2.99, "tokens_per_s": 1234.5, "learning_rate": 5e-4},
            **{"grad_norm": 0.7, "mu_mean": 0.051, "mu_min": 0.04, "mu_max": 0.062},
            "seconds": 2.0,
        }
        writer.write(record(2, eval_loss=2.5))
    assert read_metrics(path) == [record(1), record(2, eval_loss=2.5)]


@pytest.mark.parametrize(
    ("resume_step", "kept"), [(0, []), (3, [1, 2, 3]), (9, [1, 2, 3, 4, 5])], ids=str
)
def test_a_resumed_run_repeats_no_step(tmp_path, resume_step, kept):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(1, 6))
    with path.open("a") as stream:
        stream.write('{"step": 6, "loss": 1.')  # the process was killed here
    with MetricsWriter(path, resume_step=resume_step) as writer:
        writer.write(record(resume_step + 1, loss=0.5))
    assert [r.step for r in read_metrics(path)] == [*kept, resume_step + 1]
    assert read_metrics(path)[-1].loss == 0.5
    assert list(tmp_path.iterdir()) == [path]


def test_numbers_that_are_not_finite_stay_valid_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, [1], loss=math.nan, grad_norm=math.inf, mu_mean=None)
    line = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert line["loss"] is line["grad_norm"] is line["mu_mean"] is None
    (read,) = read_metrics(path)
    assert math.isnan(read.loss)
    assert read.mu_mean is None


@pytest.mark.parametrize("line", ["{", "5", '{"step": 1}', '{"step": 1, "colour": 2}'])
def test_a_damaged_file_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, [1])
    path.write_text(path.read_text() + line + "\n" + path.read_text())
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2, holds no metrics"):
        read_metrics(path)
    with MetricsWriter(path):  # a new run does not care
        pass
    assert path.read_text() == ""


# --- progress --------------------------------------------------------------------------------


def test_lines_replace_the_bar_where_there_is_no_terminal():
    out = io.StringIO()
    with TrainingProgress(100, console=Console(file=out)) as progress:
        for step in range(1, 101):
            progress.update(record(step))
        progress.note("held out: [2.5] /after")
    lines = out.getvalue().splitlines()
    assert lines == [
        "step 1/100  loss 2.990  mu 0.051  1,234 tokens/s",
        "step 100/100  loss 2.000  mu 0.150  1,234 tokens/s",
        "held out: [2.5] /after",
    ]


def test_long_runs_say_something_every_ten_seconds(monkeypatch):
    now = iter(range(0, 10_000, 4))
    monkeypatch.setattr("experiments.training.report.time.monotonic", lambda: next(now))
    out = io.StringIO()
    with TrainingProgress(20, first_step=10, console=Console(file=out)) as progress:
        for step in range(11, 21):
            progress.update(record(step, mu_mean=None, seconds=600.0 if step == 11 else 4.0))
    lines = out.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["11/20", "14/20", "17/20", "20/20"]
    # The first step compiled: it does not count in the time left.
    assert lines[1].endswith("tokens/s  0:00:24 left")
    assert "mu" not in out.getvalue()


def test_a_terminal_gets_a_bar():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100, legacy_windows=False)
    with TrainingProgress(4, console=console) as progress:
        for step in range(1, 4):
            progress.update(record(step))
    shown = out.getvalue()
    assert "compiling" in shown
    assert "3/4" in shown
    assert "loss 2.970  mu 0.053  1,234 tokens/s  0:00:02 left" in shown
    assert shown.rstrip().endswith("\x1b[?25h")  # the cursor is back


# --- the plot --------------------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """The figures that were saved."""
    figures: list[Figure] = []
    save = Figure.savefig

    def remember(figure, *arguments, **options):
        figures.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", remember)
    return figures


def test_the_plot_shows_loss_share_and_held_out_losses(tmp_path, drawn):
    metrics, png = tmp_path / "metrics.jsonl", tmp_path / "run.png"
    write_steps(metrics, range(1, 41))
    png.write_bytes(b"an earlier plot")
    plot_run(metrics, png, title="Demo", eval_before=2.5, eval_after=2.0)
    assert imread(png).shape == (975, 1350, 4)
    assert sorted(tmp_path.iterdir()) == [metrics, png]

    loss, share = drawn[0].axes
    assert loss.get_title(loc="left") == "Demo"
    labels = [text.get_text() for text in loss.get_legend().get_texts()]
    assert labels[-2:] == [
        "held out before: 2.500 (perplexity 12.2)",
        "held out after: 2.000 (perplexity 7.4)",
    ]
    steps = read_metrics(metrics)
    raw, smooth = (np.asarray(line.get_ydata()) for line in loss.lines[:2])
    np.testing.assert_array_equal(raw, [r.loss for r in steps])
    assert smooth[20] == pytest.approx(np.mean(raw[18:23]))
    np.testing.assert_array_equal(share.lines[0].get_ydata(), [r.mu_mean for r in steps])
    band = share.collections[0].get_datalim(share.transData)
    assert (band.y0, band.y1) == pytest.approx((0.04, 0.14))


@pytest.mark.parametrize(
    "changes",
    [{"mu_mean": None, "mu_min": None, "mu_max": None}, {"loss": math.nan}, {"eval_loss": 2.2}],
    ids=["no_memory", "nan", "evaluated"],
)
@pytest.mark.parametrize("count", [1, 30])
def test_any_run_can_be_drawn(tmp_path, drawn, changes, count):
    metrics, png = tmp_path / "metrics.jsonl", tmp_path / "run.png"
    write_steps(metrics, range(1, count + 1), **changes)
    plot_run(metrics, png, eval_before=800.0)
    assert png.read_bytes().startswith(b"\x89PNG")
    assert len(drawn[0].axes) == (1 if "mu_mean" in changes else 2)


def test_a_step_that_is_not_finite_leaves_the_smoothed_curve_whole(tmp_path, drawn):
    metrics = tmp_path / "metrics.jsonl"
    with MetricsWriter(metrics) as writer:
        for step in range(1, 31):
            writer.write(record(step, loss=math.nan if step == 15 else 2.0))
    plot_run(metrics, tmp_path / "run.png")
    np.testing.assert_allclose(drawn[0].axes[0].lines[1].get_ydata(), 2.0)


def test_nothing_to_draw_is_an_error(tmp_path):
    write_steps(tmp_path / "metrics.jsonl", [])
    with pytest.raises(ValueError, match="holds no steps"):
        plot_run(tmp_path / "metrics.jsonl", tmp_path / "run.png")
    assert not (tmp_path / "run.png").exists()
