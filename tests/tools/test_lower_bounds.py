"""CI's oldest dependencies are the ones that pyproject.toml says."""

import runpy
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement


def test_every_bound_becomes_a_constraint(project_dir):
    command = [sys.executable, "tools/lower_bounds.py"]
    done = subprocess.run(command, cwd=project_dir, capture_output=True, text=True, check=True)
    project = tomllib.loads((project_dir / "pyproject.toml").read_text())["project"]
    stated = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    specified = [
        (requirement.name, each)
        for requirement in map(Requirement, stated)
        for each in requirement.specifier
    ]
    assert {name for name, _ in specified} == {Requirement(each).name for each in stated}
    # Exact releases need no constraint.
    assert {each.operator for _, each in specified} <= {">=", "=="}
    lower = [f"{name}=={each.version}" for name, each in specified if each.operator == ">="]
    assert done.stdout.splitlines() == lower


@pytest.mark.parametrize(
    ("requirement", "expected"),
    [
        ("numpy>=2.0", ["numpy==2.0"]),
        ("mkdocs >= 1.6, <2", ["mkdocs==1.6"]),
        ("mkdocstrings[python]>=1.0; python_version > '3.10'", ["mkdocstrings==1.0"]),
        ("torch==2.13.0", []),
    ],
)
def test_forms_of_a_requirement(requirement, expected, project_dir):
    lower_bounds = runpy.run_path(str(project_dir / "tools" / "lower_bounds.py"))["lower_bounds"]
    project = {"dependencies": [requirement], "optional-dependencies": {"test": []}}
    assert list(lower_bounds({"project": project})) == expected
