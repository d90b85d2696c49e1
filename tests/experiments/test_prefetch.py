"""Batches that are prepared in a thread."""

import threading

import pytest

from experiments.training import prefetch
from experiments.training.prefetch import Prefetch


def test_items_come_in_order_from_one_thread():
    threads = set()

    def make(number):
        threads.add(threading.get_ident())
        return number * number

    with Prefetch(make, 3, 8) as ahead:
        assert [ahead.get().item for _ in range(5)] == [9, 16, 25, 36, 49]
    assert len(threads) == 1
    assert threading.get_ident() not in threads


def test_an_error_comes_in_its_place():
    def make(number):
        if number == 1:
            raise ValueError("row 7 is broken")
        return number

    with Prefetch(make, 0, 5) as ahead:
        assert ahead.get().item == 0
        with pytest.raises(ValueError, match="row 7 is broken"):
            ahead.get()


def test_leaving_early_ends_the_thread():
    made = []
    before = threading.active_count()
    with Prefetch(made.append, 0, 1000) as ahead:
        ahead.get()
    assert threading.active_count() == before
    # Few are made ahead.
    assert len(made) <= 4


def test_after_an_error_no_one_waits_for_the_thread(monkeypatch):
    monkeypatch.setattr(prefetch, "_LAST_SECONDS", 0.1)
    before, released = threading.active_count(), threading.Event()
    with pytest.raises(KeyboardInterrupt), Prefetch(lambda _: released.wait(), 0, 5):
        raise KeyboardInterrupt
    assert threading.active_count() == before + 1
    released.set()
