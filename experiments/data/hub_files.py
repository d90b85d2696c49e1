"""Files of data sets on the Hugging Face Hub that we read ourselves: JSON, JSON Lines and CSV.

`datasets` says which files a split has. It does not read them: its reader makes dates of texts and
gives every row the keys of all.
"""

import contextlib
import hashlib
import json
import re
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from convert.sources.demo import cache_directory
from experiments.data.file_rows import kind_of
from experiments.data.hub_rows import plain_files, quiet_errors
from tptt_jax.durable import atomic_file

_ADDRESS = re.compile(
    r"hf://datasets/(?P<repo>[^/@]+/[^/@]+|[^/@]+)@(?P<revision>[^/]+)/(?P<path>.+)"
)


class HubFile(NamedTuple):
    """A file of a data set at a commit."""

    repo: str
    revision: str
    path: str

    def fetch(self) -> Path:
        """Downloads the file unless it is in the Hub's cache.

        Raises:
          FileNotFoundError: if the Hub cannot be reached.
          ValueError: if it does not give the file.
        """
        with quiet_errors(f"{self.path} of {self.repo}"):
            from huggingface_hub import hf_hub_download

            found = hf_hub_download(
                self.repo, self.path, repo_type="dataset", revision=self.revision
            )
            return Path(found)


def hub_files(name: str, revision: str | None) -> dict[str, list[HubFile]] | None:
    """The files of each split of a data set.

    What was found is kept, so that a later run needs no network.

    Args:
      name: of the data set.
      revision: branch, tag or commit; None: the newest.

    Returns:
      None if they are not only JSON and CSV files as we read them, or the Hub does not say.
    """
    kept = _kept_listing(name, revision)
    try:
        splits = _ask(name, revision)
    except (FileNotFoundError, ValueError):
        return _read_listing(kept)
    found = _own_kinds(splits)
    if found is not None:
        # Without a cache only the network is needed again.
        with contextlib.suppress(OSError), atomic_file(kept) as path:
            path.write_text(json.dumps(found), encoding="utf-8")
    return found


def _ask(name: str, revision: str | None) -> dict[str, list[str]] | None:
    """Addresses of the files of each split; None: of other kinds."""
    options: dict[str, Any] = {} if revision is None else {"revision": revision}
    with quiet_errors(name):
        import datasets

        return plain_files(datasets.load_dataset_builder(name, **options))


def _own_kinds(splits: dict[str, list[str]] | None) -> dict[str, list[HubFile]] | None:
    found: dict[str, list[HubFile]] = {}
    for split, addresses in (splits or {}).items():
        for address in addresses:
            parts = _ADDRESS.fullmatch(address)
            if parts is None or kind_of(Path(parts["path"])) not in ("json", "csv"):
                return None
            file = HubFile(parts["repo"], unquote(parts["revision"]), parts["path"])
            found.setdefault(split, []).append(file)
    return found or None


def _kept_listing(name: str, revision: str | None) -> Path:
    key = hashlib.sha256(f"{name}@{revision}".encode()).hexdigest()[:16]
    return cache_directory() / "datasets" / f"{key}.json"


def _read_listing(kept: Path) -> dict[str, list[HubFile]] | None:
    """What an earlier run has found, if any did."""
    try:
        listing = json.loads(kept.read_text(encoding="utf-8"))
        return {split: [HubFile(*file) for file in files] for split, files in listing.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return None
