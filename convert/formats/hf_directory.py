"""The weights of a Hugging Face directory: one safetensors file, or shards with an index."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from convert.errors import ConversionError, listing
from convert.formats.files import check_regular, read_json, write_json
from convert.formats.safetensors_io import SafetensorsFile, TensorSpec, write_safetensors
from convert.formats.tensors import TensorInfo

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class SafetensorsDirectory:
    """All safetensors shards of a directory, as one source of tensors."""

    def __init__(self, directory: Path):
        """Finds the files and checks every header.

        Args:
          directory: a Hugging Face model directory.

        Raises:
          ConversionError: if there are no safetensors weights, the index is damaged or points
            outside the directory, a shard is missing, or a tensor is stored twice.
        """
        self.directory = directory
        self._files: dict[str, SafetensorsFile] = {}
        for file in _weight_files(directory):
            twice = self._files.keys() & file.tensors.keys()
            if twice:
                raise ConversionError(
                    f"{file.path} repeats tensors of other shards: {listing(twice)}."
                )
            self._files.update(dict.fromkeys(file.tensors, file))
        self._tensors = {name: file.tensors[name] for name, file in self._files.items()}

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor of the directory, by name."""
        return self._tensors

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor (see `SafetensorsFile.read`)."""
        return self._files[name].read(name)


def _weight_files(directory: Path) -> list[SafetensorsFile]:
    for name in (INDEX_FILE, SINGLE_FILE):
        check_regular(directory / name)
    if (directory / INDEX_FILE).is_file():
        return _indexed_files(directory)
    if (directory / SINGLE_FILE).is_file():
        return [SafetensorsFile(directory / SINGLE_FILE)]
    pickles = [path.name for pattern in _PICKLES for path in directory.glob(pattern)]
    if pickles:
        raise ConversionError(
            f"{directory} has its weights only as Python pickles ({listing(pickles)}), which can "
            "run code when they are read. Convert them where you trust them: "
            "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(OTHER_DIR) writes "
            "safetensors."
        )
    raise ConversionError(
        f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}; give a Hugging Face model "
        "directory with safetensors weights."
    )


def _indexed_files(directory: Path) -> list[SafetensorsFile]:
    """The shards of the index, after checking it against their contents."""
    index_path = directory / INDEX_FILE
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConversionError(f"{index_path} has no weight_map: fetch it again.")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not _stays_inside(name):
            raise ConversionError(
                f"{index_path} places {tensor} in {name!r:.200}, which is not a file name inside "
                "the directory: repair the index."
            )
    names = sorted(set(weight_map.values()))
    for name in names:
        check_regular(directory / name)
    absent = [name for name in names if not (directory / name).is_file()]
    if absent:
        raise ConversionError(
            f"{directory} lacks the shards {listing(absent)} that its index names; the download "
            "is incomplete."
        )
    files = {name: SafetensorsFile(directory / name) for name in names}
    wrong = [
        f"{tensor} ({name})"
        for tensor, name in weight_map.items()
        if tensor not in files[name].tensors
    ]
    if wrong:
        raise ConversionError(
            f"{index_path} names tensors that their shards do not hold: {listing(wrong)}."
        )
    return list(files.values())


def _stays_inside(name: str) -> bool:
    # By the name alone: in the hub's cache the files are links to blobs.
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    outside = posix.is_absolute() or bool(windows.drive) or "\\" in name or "\0" in name
    return bool(name) and not outside and ".." not in posix.parts


def write_weights(
    directory: Path,
    specs: Sequence[TensorSpec],
    arrays: Iterable[np.ndarray],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes tensors as one file, or as numbered shards with an index.

    Args:
      directory: an existing directory.
      specs: the tensors to come.
      arrays: the tensors in the order of `specs`, computed one at a time.
      max_shard_bytes: most bytes per shard, unless a single tensor is larger.
    """
    shards = list(_shards(specs, max_shard_bytes))
    stream: Iterator[np.ndarray] = iter(arrays)
    if len(shards) == 1:
        write_safetensors(directory / SINGLE_FILE, specs, stream)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(directory / name, shard, islice(stream, len(shard)))
        weight_map.update(dict.fromkeys((spec.name for spec in shard), name))
    total = sum(spec.nbytes for spec in specs)
    index: dict[str, Any] = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(directory / INDEX_FILE, index)


def _shards(specs: Sequence[TensorSpec], limit: int) -> Iterator[list[TensorSpec]]:
    shard: list[TensorSpec] = []
    for spec in specs:
        if shard and sum(each.nbytes for each in shard) + spec.nbytes > limit:
            yield shard
            shard = []
        shard.append(spec)
    yield shard
