"""Warnings before a memory blows up."""

import io
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from experiments.data import TokenBatch
from experiments.training import telemetry
from experiments.training.metrics import StepRecord
from experiments.training.telemetry import Telemetry, begin_of, find_dangers
from tptt_jax.training.memory_health import MemoryHealth
from tptt_jax.training.train_step import Batch

FINE = MemoryHealth(*map(np.array, ([0.2, 0.1], [50.0, np.inf], [1.0, 2.0], [20.0, 30.0])))


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"state_norm": np.array([1.0, 101.0])}, "state_norm", "layer 5 is 101 times"),
        (
            {"condition": np.array([2e5, 1.0])},
            "condition",
            "layer 2 has the condition number 2e+05",
        ),
        ({"condition": np.array([np.inf, 1.0])}, "condition", "condition number inf"),
        ({"share": np.array([0.1, np.nan])}, "finite", "layer 5 is not finite"),
        ({"state_norm": np.array([np.inf, 1.0])}, "finite", "layer 2 is not finite"),
    ],
    ids=["norm", "condition", "singular", "share", "overflow"],
)
def test_dangers_are_named_by_layer(change, kind, message):
    assert find_dangers(FINE, (2, 5)) == {}
    found = find_dangers(FINE._replace(**change), (2, 5))
    assert list(found) == [kind]
    assert message in found[kind]
    assert "lower the learning rate" in found[kind]


def test_the_memory_is_measured_now_and_then_and_a_danger_is_said_once(monkeypatch):
    shown, row = io.StringIO(), Batch(*[jnp.ones((1, 8), jnp.int32)] * 3)
    values = FINE._replace(share=np.array([0.25, 0.5]), state_norm=np.array([1.0, 1000.0]))
    health = MemoryHealth(*map(jnp.asarray, values))
    monkeypatch.setattr(telemetry, "measure_memory", lambda *_: health)
    monkeypatch.setattr(telemetry, "memory_layers", lambda _: (0, 1))
    meter = Telemetry(row=row, every=2, console=Console(file=shown, width=500))
    model: Any = lambda: None  # noqa: E731
    records = [
        meter.add(
            StepRecord(step=step, loss=1.0, tokens_per_s=1.0, seconds=1.0, eval_loss=loss),
            model,
            is_last=step == 5,
        )
        for step, loss in enumerate([None, None, 1.0, None, None], start=1)
    ]
    assert [record.step for record in records if record.memory] == [2, 3, 4, 5]
    assert records[-1].memory == {
        "layer": [0, 1],
        "share": [0.25, 0.5],
        "half_life": [50.0, None],
        "state_norm": [1.0, 1000.0],
        "condition": [20.0, 30.0],
    }
    assert shown.getvalue().count("warning: step 2: the state of layer 1") == 1
    assert shown.getvalue().count("warning") == 1


def test_a_row_is_long_enough_to_lose_tokens():
    row = TokenBatch(*[np.ones((1, 100), np.int32)] * 3)
    assert [begin_of(row, 10, window).tokens.shape[1] for window in (None, 4, 30)] == [10, 10, 60]
