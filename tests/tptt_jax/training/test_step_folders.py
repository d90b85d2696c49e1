"""Folders of checkpoints: wherever a process dies, only complete steps are found."""

import contextlib
import shutil
from pathlib import Path

import pytest

from tptt_jax.training import step_folders
from tptt_jax.training.step_folders import (
    DamagedStep,
    check_step,
    list_steps,
    remove_leftovers,
    write_step,
)


class Killed(BaseException):
    """The process has ended here."""


def fill(folder: Path) -> None:
    (folder / "weights").mkdir(parents=True)
    (folder / "weights" / "data").write_bytes(b"x" * 100)


@pytest.mark.parametrize("replaces", [False, True])
def test_a_death_at_any_call_leaves_whole_steps_only(replaces, tmp_path, monkeypatch):
    write_step(tmp_path, 1, fill)
    seen = 0
    for last in range(30):
        calls = 0

        def counted(function, last=last):
            def call(*arguments):
                nonlocal calls
                calls += 1
                if calls > last:
                    raise Killed
                return function(*arguments)

            return call

        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            patch.setattr(step_folders, "sync_path", counted(step_folders.sync_path))
            patch.setattr(Path, "rename", counted(Path.rename))
            # A dead process cleans nothing up.
            patch.setattr(shutil, "rmtree", lambda *_, **__: None)
            write_step(tmp_path, 1 if replaces else 2, fill)
        for step in list_steps(tmp_path):
            check_step(tmp_path / str(step), ("weights",))
        remove_leftovers(tmp_path)
        assert all(not each.name.startswith(".") for each in tmp_path.iterdir())
        seen = max(seen, calls)
        if calls <= last:
            break
        check_step(tmp_path / "1", ("weights",))
        shutil.rmtree(tmp_path / "2", ignore_errors=True)
    assert seen >= 6, "all calls were tried"


def test_what_cannot_be_filled_leaves_nothing(tmp_path):
    def failing(folder: Path) -> None:
        fill(folder)
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        write_step(tmp_path, 1, failing)
    assert list(tmp_path.iterdir()) == []


def test_a_manifest_that_leads_nowhere_is_not_an_older_step_without_one(tmp_path):
    write_step(tmp_path, 1, fill)
    manifest = tmp_path / "1" / "manifest.json"
    manifest.unlink()
    check_step(tmp_path / "1", ("weights",))
    manifest.symlink_to(tmp_path / "nowhere")
    with pytest.raises(DamagedStep, match=r"manifest.json: No such file"):
        check_step(tmp_path / "1", ("weights",))


def test_a_link_to_itself_is_damage(tmp_path):
    write_step(tmp_path, 1, fill)
    data = tmp_path / "1" / "weights" / "data"
    data.unlink()
    data.symlink_to(data)
    with pytest.raises(DamagedStep, match="weights/data: Too many levels of symbolic links"):
        check_step(tmp_path / "1", ("weights",))
