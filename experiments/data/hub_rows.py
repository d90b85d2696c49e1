"""Rows that the library `datasets` reads: from the Hugging Face Hub, and from Parquet files."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tptt_jax.error_text import first_line

_ROWS_AT_ONCE = 256


def dataset_rows(
    name: str, split: str, most: int | None, *, shown: str | Path, **options: Any
) -> tuple[tuple[str, ...], list[dict[str, Any]]]:
    """Columns and rows that `datasets.load_dataset` reads.

    Args:
      name: of a builder or of a dataset on the Hub.
      split: or a slice of it.
      most: most rows to read.
      shown: the name in messages.
      options: of `load_dataset`.

    Raises:
      FileNotFoundError: if there is no such dataset.
      ValueError: if it cannot be read.
    """
    with quiet_errors(shown):
        import datasets  # takes seconds to import, and the demo text does not need it

        table = datasets.load_dataset(name, split=split, **options)
        if most is not None:
            table = table.select(range(min(most, len(table))))
        return tuple(table.column_names), [_without_nulls(row) for row in table.to_list()]


def parquet_rows(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file one by one.

    Raises:
      ValueError: if it cannot be read.
    """
    with quiet_errors(file):
        import pyarrow.parquet as pq

        with pq.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=_ROWS_AT_ONCE):
                yield from map(_without_nulls, batch.to_pylist())


def iterate_dataset(
    name: str, split: str, **options: Any
) -> tuple[str | None, Iterator[dict[str, Any]]]:
    """The rows of a data set one by one, as `datasets` streams them.

    Args:
      name: on the Hub, or a folder.
      split: a whole one.
      options: of `load_dataset`.

    Returns:
      The data set's present commit, None for a folder or without a network; and its rows, which are
      not requested before the first one is.
    """

    def rows() -> Iterator[dict[str, Any]]:
        with quiet_errors(name):
            import datasets

            for row in datasets.load_dataset(name, split=split, streaming=True, **options):
                yield _without_nulls(row)

    return _commit(name, options.get("revision")), rows()


def _commit(name: str, revision: str | None) -> str | None:
    if Path(name).exists():
        return None
    from huggingface_hub import HfApi

    with contextlib.suppress(Exception):  # no network; the copy of an earlier run may be there
        return HfApi().dataset_info(name, revision=revision).sha
    return None


def folder_files(folder: Path, *, shown: Path | None = None) -> dict[str, list[Path]] | None:
    """The files of each split of a folder, as `datasets` assigns them by name or README.md.

    Args:
      folder: the folder.
      shown: its name in messages; None: its own.

    Returns:
      None if only `datasets` can read them.

    Raises:
      ValueError: if there is nothing to read.
    """
    with tempfile.TemporaryDirectory() as cache, quiet_errors(shown or folder):
        import datasets

        found = plain_files(datasets.load_dataset_builder(str(folder), cache_dir=cache))
        if found is None:
            return None
        return {split: list(map(Path, files)) for split, files in found.items()}


def plain_files(builder: Any) -> dict[str, list[str]] | None:
    """Paths or addresses of the files of each split that a builder of `datasets` reads.

    Returns:
      None if we do not read its kind ourselves, or it has settings that we do not have, such as
      another separator.
    """
    import datasets

    if builder.name not in ("json", "csv", "text", "parquet"):
        return None
    config, plain = builder.config, type(builder.config)()
    own = {field.name for field in dataclasses.fields(config)}
    own -= {field.name for field in dataclasses.fields(datasets.BuilderConfig)} | {"features"}
    changed = {name for name in own if getattr(config, name) != getattr(plain, name)}
    found = {
        str(split): list(map(str, files)) for split, files in (config.data_files or {}).items()
    }
    names = [name for files in found.values() for name in files]
    if changed == {"sep"} and config.sep == "\t" and any(".tsv" in name for name in names):
        changed = set()  # of files with this extension, as we read them
    return None if changed else found


def slice_splits(split: str, lengths: dict[str, int]) -> list[tuple[str, int, int]]:
    """The rows that an expression such as "train[:10%]" names: split, first, end.

    Raises:
      ValueError: if it names none.
    """
    if split in lengths:
        return [(split, 0, lengths[split])]
    import datasets

    parts = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    return [(part.splitname, part.from_, part.to) for part in parts]


@contextmanager
def quiet_errors(shown: str | Path) -> Iterator[None]:
    """Turns errors of `datasets` into one line, without its progress bars and log lines."""
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    verbosity = datasets.logging.get_verbosity()
    had_bars = not datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    except (DatasetNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"{shown} is neither a local file nor an available dataset on the Hugging Face Hub "
            f"({first_line(error)}): check the name."
        ) from error
    # The builders pass on any exception of theirs, of pandas and of pyarrow, even StopIteration.
    except Exception as error:
        raise ValueError(f"Cannot read {shown} as a dataset: {first_line(error)}") from error
    finally:
        datasets.logging.set_verbosity(verbosity)
        if had_bars:
            datasets.enable_progress_bars()


def _without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """A row of Arrow without the keys that only other rows have."""

    def own(value: Any) -> Any:
        if isinstance(value, list):
            return [own(item) for item in value]
        if isinstance(value, dict):
            return {key: own(item) for key, item in value.items() if item is not None}
        return value

    return own(row)
