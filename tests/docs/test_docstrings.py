"""Examples in docstrings give what they show."""

import doctest
import importlib

import pytest

from tests.docs.pages import PROJECT


def _modules():
    for package in ("tptt_jax", "convert", "experiments"):
        for path in sorted((PROJECT / package).rglob("*.py")):
            if ">>>" in path.read_text(encoding="utf-8"):
                parts = path.relative_to(PROJECT).with_suffix("").parts
                yield ".".join(parts).removesuffix(".__init__")


MODULES = list(_modules())


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_a_module(name):
    results = doctest.testmod(importlib.import_module(name), report=True)
    assert results.attempted > 0
    assert results.failed == 0


def test_examples_are_found():
    assert {"tptt_jax.model", "tptt_jax.config.memory.liza"} <= set(MODULES)
