"""What to train on, and how it is laid out: the options of the data."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tyro

from experiments.data.columns import FormatChoice, read_columns
from experiments.data.data_files import PYTHON_DOCS
from experiments.data.formats import Loss
from experiments.data.probes import PROBES, ProbeKind


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to train on, and how it is laid out in rows of tokens."""

    path: Annotated[str | tuple[str, ...], tyro.conf.arg(name="data", prefix_name=False)] = (
        PYTHON_DOCS
    )
    """"python-docs" (the Python language reference that comes with every CPython); JSON Lines,
    JSON, CSV, TSV, Parquet or text files (all but Parquet also as .gz or .zst), a folder or a
    pattern of them; or a dataset id on the Hugging Face Hub."""
    split: str = "train"
    """Split of a Hub dataset or a folder; a slice such as "train[:500]" works for all but one whole
    text."""
    revision: str | None = None
    """Branch, tag or commit of a Hub dataset; None: the newest."""
    format: FormatChoice = "auto"
    """"text": one column of text; "alpaca": instruction, input (may be empty or missing), output;
    "chat": messages with role and content; "sharegpt": conversations with from and value;
    "prompt-completion": texts or messages; "question-answer"; "auto": what the columns say."""
    columns: tuple[str, ...] = ()
    """Names of columns where they are others than a format's: prompt=question completion=answer."""
    text_column: str = "text"
    """Column of plain text."""
    max_rows: int | None = None
    """Reads only so many rows; None: all."""
    sequence_length: int = 256
    """Tokens per row; longer text is cut into several rows, other longer examples are cut off."""
    packing: bool = True
    """Several short examples share a row, without seeing each other; False: one row each."""
    loss: Loss = "answers"
    """"answers": only what the assistant says counts; "all": prompts count too. In plain text
    everything counts."""
    eval_tokens: int = 2000
    """Tokens at the beginning of a whole text (python-docs, a text file) that are held out."""
    eval_length: int | None = None
    """Tokens per row of them; None: as long as rows can be, up to 2,048, where a memory counts."""
    eval_rows: float = 0.05
    """Rows of a table that are held out, chosen by the seed: a share if below 1, else a count."""
    recall: float = 0.0
    """Share of rows, below 1, that ask for pass keys, numbers or pairs hidden beyond the window, in
    text and in noise. They teach the memory to recall. Their answers count, and so does text that
    hides something; noise does not. With packing such a row has several questions of different
    lengths."""
    recall_kinds: tuple[ProbeKind, ...] = ("passkey", "needle", "pairs")
    """What such rows ask for, in turn."""

    def __post_init__(self) -> None:
        """Rejects values that no data can be read with."""
        check_literals(self)
        read_columns(self.columns)
        if not isinstance(self.path, str) and len(self.path) < 2:
            if not self.path:
                raise ValueError("data must name a file, a folder or a dataset, got nothing.")
            object.__setattr__(self, "path", self.path[0])
        minima = {"sequence_length": 2, "max_rows": 1, "eval_tokens": 0, "eval_length": 2}
        for name, minimum in minima.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise ValueError(f"{name} must be at least {minimum}, got {value}.")
        if not 0 <= self.recall < 1:
            raise ValueError(f"recall must lie in [0, 1), got {self.recall}.")
        if not self.recall_kinds or not set(self.recall_kinds) <= set(PROBES):
            raise ValueError(
                f"recall_kinds must name some of {', '.join(PROBES)}, got {self.recall_kinds}."
            )
        if self.eval_rows < 0 or (self.eval_rows >= 1 and self.eval_rows % 1):
            raise ValueError(
                "eval_rows must be a share in [0, 1) or a whole number of rows, "
                f"got {self.eval_rows}."
            )

    @property
    def shown(self) -> str:
        """What `path` names, for messages."""
        return self.path if isinstance(self.path, str) else " ".join(self.path)


def check_literals(config: Any) -> None:
    """Raises ValueError if a field of a configuration is none of the choices its type names."""
    for name, hint in get_type_hints(type(config)).items():
        choices = get_args(hint)
        if get_origin(hint) is Literal and getattr(config, name) not in choices:
            raise ValueError(
                f"{name} must be one of {', '.join(map(str, choices))}, "
                f"got {getattr(config, name)!r}."
            )
