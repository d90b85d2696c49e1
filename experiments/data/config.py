"""The options of the training data, and of its layout in rows."""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tyro

from experiments.data.columns import FormatChoice, read_columns
from experiments.data.data_files import PYTHON_DOCS
from experiments.data.formats import Loss
from experiments.data.probes import PROBES, ProbeKind


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training data, and its layout in rows of tokens."""

    path: Annotated[str | tuple[str, ...], tyro.conf.arg(name="data", prefix_name=False)] = (
        PYTHON_DOCS
    )
    """"python-docs" (the Python language reference that comes with every CPython); JSON Lines,
    JSON, CSV, TSV, Parquet or text files (all but Parquet also as .gz or .zst), a folder or a
    pattern of them; or a dataset id on the Hugging Face Hub."""
    split: str = "train"
    """Split of a Hub dataset or a folder; slices such as "train[:500]" work for tables only."""
    revision: str | None = None
    """Branch, tag or commit of a Hub dataset; None: the newest."""
    format: FormatChoice = "auto"
    """"text": one column of text; "alpaca": instruction, input (may be empty or missing), output;
    "chat": messages with role and content; "sharegpt": conversations with from and value;
    "prompt-completion": texts or messages; "question-answer"; "auto": by the columns."""
    columns: tuple[str, ...] = ()
    """Names of columns that differ from the format's: prompt=question completion=answer."""
    text_column: str = "text"
    """Column of plain text."""
    max_rows: int | None = None
    """Most rows to read; None: all. With weights, of each data set."""
    streaming: bool = False
    """Read and tokenise rows while training, in a random order over all of them and in constant
    memory, for data that does not fit in memory. Needs --steps. A share of eval_rows holds out at
    most 1,000 rows."""
    weights: tuple[float, ...] = ()
    """With streaming: each path of --data is a data set of its own, and these are their shares of
    the rows, of any sum. None: all paths are one data set."""
    sequence_length: int = 256
    """Tokens per row; longer texts are split over several rows, other longer examples truncated."""
    packing: bool = True
    """Short examples share a row without seeing each other; False: one example per row."""
    loss: Loss = "answers"
    """"answers": only the assistant's answers count; "all": prompts count too. In plain text all
    tokens count."""
    eval_tokens: int = 2000
    """Tokens at the beginning of a whole text (python-docs, a text file) that are held out."""
    eval_length: int | None = None
    """Tokens per held-out row; None: as many as possible up to 2,048, so that a memory matters."""
    eval_rows: float = 0.05
    """Held-out rows of a table, chosen by the seed: a share if below 1, else a number of rows."""
    recall: float = 0.0
    """Share of rows, below 1, that ask for pass keys, numbers or pairs hidden beyond the window, in
    text and in noise; only the answers count. They teach the memory to recall. With packing such a
    row has several questions of different lengths."""
    recall_text: bool = False
    """Text that hides something counts in the loss, too: recall costs less perplexity, and is
    learned more slowly."""
    recall_trains: Literal["all", "memory"] = "all"
    """"all": rows that ask are mixed with the others, and train what those train. "memory": a step
    reads them beside its rows of text, a batch or more, and they train the memory alone, so that
    the model learns from text as it does without them."""
    recall_length: int | None = None
    """With recall_trains = "memory": tokens per row that asks, so that the memory learns to recall
    from farther away than rows of text reach; None: as many as in a row of text."""
    recall_kinds: tuple[ProbeKind, ...] = ("passkey", "needle", "pairs")
    """What these rows ask for, in turn."""
    recall_haystacks: tuple[str, ...] = ()
    """Other texts that hide what is asked for: files, folders or a data set, as for --data. Varied
    ones keep more of what the model knows of other text. None: the training data."""

    def __post_init__(self) -> None:
        """Rejects invalid values."""
        check_literals(self)
        read_columns(self.columns)
        if not isinstance(self.path, str) and len(self.path) < 2:
            if not self.path:
                raise ValueError("data must name a file, a folder or a dataset, got nothing.")
            object.__setattr__(self, "path", self.path[0])
        minima = {"sequence_length": 2, "max_rows": 1, "eval_tokens": 0, "eval_length": 2}
        minima |= {"recall_length": 2}
        for name, minimum in minima.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise ValueError(f"{name} must be at least {minimum}, got {value}.")
        self._check_streaming()
        if not 0 <= self.recall < 1:
            raise ValueError(f"recall must lie in [0, 1), got {self.recall}.")
        if self.recall_haystacks and not self.recall:
            raise ValueError(
                "--data.recall-haystacks are for rows that ask for something: add --data.recall, "
                "the share of such rows, or leave them out."
            )
        if self.recall_length is not None and self.recall_trains == "all":
            raise ValueError(
                "--data.recall-length is for rows that train the memory alone; mixed with the text "
                "they are as long as its rows: add --data.recall-trains memory, or set "
                "--data.sequence-length."
            )
        if not self.recall_kinds or not set(self.recall_kinds) <= set(PROBES):
            raise ValueError(
                f"recall_kinds must name some of {', '.join(PROBES)}, got {self.recall_kinds}."
            )
        if self.eval_rows < 0 or (self.eval_rows >= 1 and self.eval_rows % 1):
            raise ValueError(
                "eval_rows must be a share in [0, 1) or a whole number of rows, "
                f"got {self.eval_rows}."
            )

    def _check_streaming(self) -> None:
        if self.weights and not self.streaming:
            raise ValueError("--data.weights mixes data sets while training: add --data.streaming.")
        paths = (self.path,) if isinstance(self.path, str) else self.path
        if self.weights and len(self.weights) != len(paths):
            raise ValueError(
                f"--data.weights must have one number for each of the {len(paths)} paths of "
                f"--data, got {len(self.weights)}."
            )
        if any(not 0 < weight < float("inf") for weight in self.weights):
            raise ValueError(f"--data.weights must be above 0, got {self.weights}.")
        if self.streaming and self.recall:
            raise ValueError(
                "--data.recall hides questions in rows that are in memory: leave out "
                "--data.streaming."
            )

    def of_other(self, path: str | tuple[str, ...], **changes: Any) -> "DataConfig":
        """The same layout of other data, which shares no option that describes data.

        Args:
          path: of the other data.
          changes: further options.
        """
        plain: dict[str, Any] = {"columns": (), "revision": None, "format": "auto"}
        plain |= {"text_column": "text", "split": "train", "max_rows": None, "loss": "all"}
        plain |= {"streaming": False, "weights": ()}
        return dataclasses.replace(self, path=path, **plain | changes)

    @property
    def recall_row_length(self) -> int:
        """Tokens per row that asks for something."""
        return self.sequence_length if self.recall_length is None else self.recall_length

    @property
    def shown(self) -> str:
        """The data's name for messages."""
        return self.path if isinstance(self.path, str) else " ".join(self.path)


def check_literals(config: Any) -> None:
    """Raises ValueError if a field of a configuration is not among the choices of its type."""
    for name, hint in get_type_hints(type(config)).items():
        choices = get_args(hint)
        if get_origin(hint) is Literal and getattr(config, name) not in choices:
            raise ValueError(
                f"{name} must be one of {', '.join(map(str, choices))}, "
                f"got {getattr(config, name)!r}."
            )
