"""Commands restart with huge pages where that helps, and collect garbage seldom."""

import ast
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from experiments.__main__ import COMMANDS
from experiments.process.huge_pages import huge_page_environment

_ROOT = Path(__file__).parents[2]
_KERNEL = Path("/sys/kernel/mm/transparent_hugepage/enabled")

_PREPARATION = """
if __name__ == '__main__':
    from experiments.process.starting import start_command
    start_command()
"""
_PROBE = f"""
{_PREPARATION}
import gc, os, sys
print(os.getpid(), os.environ.get("GLIBC_TUNABLES"), gc.get_threshold()[0], sys.argv[1:])
"""


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    path = tmp_path / "enabled"
    path.write_text("always [madvise] never\n")
    return path


def test_asks_where_the_kernel_waits_to_be_asked(kernel: Path) -> None:
    environment = huge_page_environment({"HOME": "/root"}, kernel)
    assert environment == {"HOME": "/root", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def test_starts_again_once_only(kernel: Path) -> None:
    environment = huge_page_environment({}, kernel)
    assert environment is not None
    assert huge_page_environment(environment, kernel) is None


def test_leaves_the_users_setting(kernel: Path) -> None:
    assert huge_page_environment({"GLIBC_TUNABLES": "glibc.malloc.check=1"}, kernel) is None


@pytest.mark.parametrize("setting", ["[always] madvise never", "always madvise [never]", ""])
def test_nothing_where_it_would_change_nothing(kernel: Path, setting: str) -> None:
    kernel.write_text(setting)
    assert huge_page_environment({}, kernel) is None


def test_nothing_without_the_kernels_file(tmp_path: Path) -> None:
    assert huge_page_environment({}, tmp_path / "missing") is None


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., tuple[int, str]]:
    """Runs Python where a module `probe` begins as commands do; returns process and output."""
    (tmp_path / "probe.py").write_text(_PROBE)
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}

    def run_python(*command: str) -> tuple[int, str]:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=tmp_path,
            env=environment | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(_ROOT)])},
            stdout=subprocess.PIPE,
            text=True,
        )
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        return process.pid, out.strip()

    return run_python


def test_a_command_keeps_its_process_and_arguments(run) -> None:
    arguments = ["--prompt", "two words", "--n", "1"]
    pid, out = run("-m", "probe", *arguments)
    asks = _KERNEL.exists() and "[madvise]" in _KERNEL.read_text()
    tunables = "glibc.malloc.hugetlb=1" if asks else None
    assert out == f"{pid} {tunables} 100000 {arguments}"


def test_an_import_changes_nothing(run) -> None:
    _, out = run("-c", "import probe")
    # The tests' own process has a threshold of its own (tests/conftest.py).
    _, usual = run("-c", "import gc; print(gc.get_threshold()[0])")
    assert out.split()[1:3] == ["None", usual]


_COMMANDS = [name for name, _ in COMMANDS.values() if not name.startswith("convert")]


@pytest.mark.parametrize("module", [*_COMMANDS, "experiments.bench_gpu"])
def test_every_command_begins_so(module: str) -> None:
    """Before all imports, and only where the command is the program."""
    tree = ast.parse((_ROOT / module.replace(".", "/")).with_suffix(".py").read_text())
    assert ast.unparse(tree.body[1]) == ast.unparse(ast.parse(_PREPARATION))
    called = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert [ast.unparse(node) for node in called].count("start_command()") == 1
