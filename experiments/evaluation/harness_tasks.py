"""Selects and loads tasks of lm-eval."""

import contextlib
import functools
import hashlib
import importlib.util
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from experiments.evaluation.store import row_key

if TYPE_CHECKING:  # lm-eval takes seconds to import
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task as LmEvalTask
    from lm_eval.tasks import TaskManager

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


@dataclass(frozen=True, kw_only=True)
class HarnessConfig:
    """Tasks of lm-eval, for --task harness."""

    tasks: tuple[str, ...] = ()
    """Names of tasks, groups or tags of lm-eval, patterns such as "mmlu_*", or YAML files."""
    include_path: Path | None = None
    """Directory with YAML files of more tasks."""
    num_fewshot: int | None = None
    """Examples before each question; None: each task's own number."""
    limit: float | None = None
    """Number of questions of each task, or their share if below 1. None: all."""
    batch_size: int = 8
    """Most rows at a time."""
    max_length: int | None = None
    """Most tokens of a text that a model reads; None: all positions of its configuration."""
    chat_template: bool = False
    """Asks questions in the tokenizer's chat format."""

    def __post_init__(self) -> None:
        """Rejects invalid values."""
        for name, least in {"num_fewshot": 0, "batch_size": 1, "max_length": 2}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"harness.{name} must be at least {least}, got {value}.")
        if self.limit is not None and not self.limit > 0:
            raise ValueError(f"harness.limit must be above 0, got {self.limit}.")


class LoadedTasks(NamedTuple):
    """Tasks and the groups they are in, by name."""

    tasks: "dict[str, LmEvalTask]"
    groups: "dict[str, Group]"


def check_installed() -> None:
    """Raises ValueError if lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("--task harness needs lm-eval: pip install 'tptt-jax[harness]'.")


# All models share the tasks, and loading may take minutes.
@functools.lru_cache(maxsize=1)
def load_tasks(config: HarnessConfig) -> LoadedTasks:
    """Loads the tasks and their data.

    Raises:
      ValueError: if lm-eval knows no such task or cannot load it.
    """
    names, manager = _find_tasks(config)
    try:
        loaded = manager.load(names)
    except ImportError as error:
        raise ValueError(f"a task of lm-eval needs a missing package: {error}") from error
    except KeyError as error:
        raise ValueError(f"lm-eval cannot load {', '.join(names)}: {error}") from error
    for task in loaded["tasks"].values():
        # As lm-eval does: a task's own 0 takes precedence.
        given = task.get_config("num_fewshot")
        if given is None or (given != 0 and config.num_fewshot is not None):
            task.set_config("num_fewshot", config.num_fewshot or 0)
    return LoadedTasks(loaded["tasks"], loaded.get("groups", {}))


def _find_tasks(config: HarnessConfig) -> "tuple[list[str], TaskManager]":
    """Names without patterns, and the task manager that has them."""
    from lm_eval.tasks import TaskManager

    path = None if config.include_path is None else config.include_path.expanduser()
    if path is not None and not path.is_dir():
        raise FileNotFoundError(f"no such directory: {path}; check --harness.include-path.")
    # Reading lm-eval's own tasks takes half a minute; local ones may be enough.
    for with_defaults in (False, True):
        manager = TaskManager(include_path=path, include_defaults=with_defaults)
        found = {name: _matching(manager, name) for name in config.tasks}
        missing = [name for name, matching in found.items() if not matching]
        if not missing:
            break
    else:
        raise ValueError(
            f"lm-eval knows no task {', '.join(missing)}: `lm-eval ls tasks` lists all, and "
            "--harness.include-path adds a directory of your own."
        )
    return list(dict.fromkeys(name for each in found.values() for name in each)), manager


def _matching(manager: "TaskManager", name: str) -> list[str]:
    if Path(name).expanduser().is_file():
        return [str(Path(name).expanduser())]
    return manager.match_tasks([name])


def hash_requests(config: HarnessConfig, task: "LmEvalTask") -> str:
    """A hash of a task's questions and of the answers that count as right."""
    from lm_eval.evaluator_utils import get_sample_size

    # Hides a progress bar.
    with contextlib.redirect_stderr(io.StringIO()):
        seed_examples(task)
        task.build_all_requests(limit=get_sample_size(task, config.limit))
    digest = hashlib.sha256(_ADDRESS.sub("", row_key(config=task.dump_config())).encode())
    for each in task.instances:
        digest.update(json.dumps([each.args, each.doc], sort_keys=True, default=str).encode())
    return digest.hexdigest()[:24]


def seed_examples(task: "LmEvalTask") -> None:
    """Makes a task draw the examples that lm-eval's own command draws."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
