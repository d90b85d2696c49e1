"""Runs of a test file that share their compiled steps; tracing takes longest by far."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from experiments.training import fitting, text_training

STEP_MAKERS = [
    *((fitting, "make_fit_step"), (fitting, "make_train_step")),
    (text_training, "make_train_step"),
]


@contextmanager
def share_steps() -> Iterator[None]:
    """Makes the step of a stage once for all runs with the same model, parameters and options.

    For runs whose optimizers are the same, too: nothing here can tell them apart.
    """
    made: dict[tuple, Any] = {}

    def shared(make: Callable) -> Callable:
        def remembered(partition: Any, optimizer: Any, **options: Any) -> Any:
            of_model = (partition.graphdef, *partition.template)
            settings = (make.__module__, make.__name__, *of_model, *options.items())
            if settings not in made:
                made[settings] = make(partition, optimizer, **options)
            return made[settings]

        return remembered

    with pytest.MonkeyPatch.context() as patch:
        for module, name in STEP_MAKERS:
            patch.setattr(module, name, shared(getattr(module, name)))
        yield
