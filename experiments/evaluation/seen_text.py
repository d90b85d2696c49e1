"""A note where a run was trained on the data that it is measured on."""

from pathlib import Path

from experiments.data import DataConfig
from experiments.data.data_files import PYTHON_DOCS
from experiments.data.rows import is_whole_text
from experiments.training.resume.settings import restoring, saved_settings

# With the seed, they choose the held-out rows of a table.
_CHOICE = ("eval_rows", "max_rows", "split")


def note_seen_text(run: Path, data: DataConfig, tokens: int, seed: int) -> str | None:
    """A sentence on the data that a run has seen; None: it has seen nothing that is measured.

    Args:
      run: output directory of finetune.
      data: to measure on.
      tokens: most tokens of it.
      seed: that chooses the held-out rows of a table.

    Raises:
      ValueError: if the run's config.yaml cannot be read.
    """
    saved = saved_settings(run)
    if not isinstance(data.path, str) or not _is_same(saved.get("data.path"), data.path):
        return None
    seen = f"note: {run} was fitted to or trained on {data.shown}"
    if is_whole_text(data.path):
        held_out = saved.get("data.eval_tokens")
        if held_out is None or tokens <= held_out:
            return None
        return (
            f"{seen}, all but the first {held_out:,} tokens, which --tokens {held_out} measures "
            "alone."
        )
    now = {"seed": seed} | {f"data.{name}": getattr(data, name) for name in _CHOICE}
    changed = [name for name, value in now.items() if name in saved and saved[name] != value]
    if not changed:
        return None
    remedies = " and ".join(restoring(name, saved[name]) for name in changed)
    return f"{seen}, and held out other rows of it: for those {remedies}."


def _is_same(saved: object, path: str) -> bool:
    if not isinstance(saved, str) or PYTHON_DOCS in (saved, path):
        return saved == path
    return Path(saved).expanduser().resolve() == Path(path).expanduser().resolve()
