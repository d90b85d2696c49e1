"""One command for all: names, help, mistakes."""

import importlib
import os
import subprocess
import sys
import tomllib

import pytest

import tptt_jax
from experiments.__main__ import COMMANDS, main


def run(*arguments):
    command = [sys.executable, "-m", "experiments", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_help_lists_every_command():
    done = run("--help")
    assert done.returncode == 0
    assert all(f"  {name} " in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("module", [module for module, _ in COMMANDS.values()])
def test_every_command_can_be_called(module):
    assert callable(importlib.import_module(module).main)


def test_a_command_gets_the_rest_of_the_line(tiny_model_dir):
    done = run("convert", "inspect", str(tiny_model_dir), "--json")
    assert done.returncode == 0, done.stderr
    assert "llama" in done.stdout


def test_a_wrong_name_is_answered_with_the_nearest_one():
    done = run("fintune", "--steps", "1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: there is no command 'fintune': did you mean finetune?\n"


def test_the_script_does_not_run_files_of_the_current_folder(tmp_path, project_dir):
    script = tmp_path / "bin" / "tptt-jax"
    script.parent.mkdir()
    script.write_text("import sys\nfrom experiments.__main__ import main\nsys.exit(main())\n")
    (tmp_path / "json.py").write_text("raise SystemExit('json.py of the folder was run')\n")
    command = [sys.executable, str(script), "convert", "--help"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(project_dir)},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "convert" in done.stdout


def test_the_version_is_printed(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["tptt-jax", "--version"])
    assert main() == 0
    assert capsys.readouterr().out == f"{tptt_jax.__version__}\n"


def test_the_script_and_the_version_are_those_of_pyproject(project_dir):
    project = tomllib.loads((project_dir / "pyproject.toml").read_text())
    assert project["project"]["scripts"]["tptt-jax"] == "experiments.__main__:main"
    module, _, name = project["tool"]["setuptools"]["dynamic"]["version"]["attr"].rpartition(".")
    assert getattr(importlib.import_module(module), name) == tptt_jax.__version__
