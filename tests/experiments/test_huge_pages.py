"""Commands restart with huge pages where that helps, and collect garbage seldom."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.process.huge_pages import huge_page_environment

_ROOT = Path(__file__).parents[2]
_KERNEL = Path("/sys/kernel/mm/transparent_hugepage/enabled")

# Runs as `python -m experiments.probe` would: the package first, then the module.
_PROBE = """
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


def _run(command: list[str], root: Path) -> tuple[int, str]:
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=root,
        env=environment | {"PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        text=True,
    )
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    return process.pid, out.strip()


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package's start with one more command in it."""
    directory = tmp_path / "experiments"
    (directory / "process").mkdir(parents=True)
    modules = ("__init__", "garbage", "huge_pages", "interrupts")
    for name in ("__init__.py", *(f"process/{module}.py" for module in modules)):
        (directory / name).write_text((_ROOT / "experiments" / name).read_text())
    (directory / "probe.py").write_text(_PROBE)
    return tmp_path


def test_a_command_keeps_its_process_and_arguments(package: Path) -> None:
    arguments = ["--prompt", "two words", "--n", "1"]
    pid, out = _run(["-m", "experiments.probe", *arguments], package)
    asks = _KERNEL.exists() and "[madvise]" in _KERNEL.read_text()
    tunables = "glibc.malloc.hugetlb=1" if asks else None
    assert out == f"{pid} {tunables} 100000 {arguments}"


def test_an_import_changes_nothing(package: Path) -> None:
    _, out = _run(["-c", "import experiments.probe"], package)
    assert out.split()[1:3] == ["None", str(gc.get_threshold()[0])]


def test_a_command_of_others_that_imports_us_is_left_alone(package: Path) -> None:
    (package / "theirs").mkdir()
    (package / "theirs" / "__init__.py").write_text("import experiments\n")
    (package / "theirs" / "probe.py").write_text(_PROBE)
    _, out = _run(["-m", "theirs.probe"], package)
    assert out.split()[1:3] == ["None", str(gc.get_threshold()[0])]
