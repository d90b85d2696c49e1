"""JSON and CSV files of data sets on the Hub, with stand-ins for what lists and fetches them."""

import json
import os

import datasets
import pytest

from experiments.data.data_files import find_data
from experiments.data.rows import load_rows
from experiments.training.resume.fingerprints import of_data

DATED = {"text": "2024-05-01"}
LATE = {"text": "a", "late": [{"x": 1}, {"y": "007"}]}
OTHER = {"text": "b"}


def write_rows(path, *rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder that is a data set; `asked` is what was listed and fetched."""
    folder = tmp_path / "data set"
    folder.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    real, asked = datasets.load_dataset_builder, []

    def list_files(name, revision=None):
        asked.append((name, revision))
        builder = real(str(folder), cache_dir=str(tmp_path / "builders"))
        builder.config.data_files = {
            split: [
                f"hf://datasets/{name}@c0ffee/{os.path.relpath(file, folder)}" for file in files
            ]
            for split, files in builder.config.data_files.items()
        }
        return builder

    def fetch(repo, path, repo_type, revision):
        assert (repo_type, revision) == ("dataset", "c0ffee")
        asked.append(path)
        return str(folder / path)

    def load_dataset(name, **options):
        asked.append(("datasets", name, options))
        return datasets.Dataset.from_list([OTHER])

    monkeypatch.setattr("datasets.load_dataset_builder", list_files)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    return folder, asked


def test_each_row_keeps_its_own_keys_and_texts(hub):
    folder, asked = hub
    write_rows(folder / "train.jsonl", DATED, LATE)
    write_rows(folder / "more" / "test.json", OTHER)
    found = load_rows("some/data", revision="v1")
    assert found.rows == [DATED, LATE]
    # Files of other splits are not fetched.
    assert asked == [("some/data", "v1"), "train.jsonl"]
    assert found.source == "some/data"
    assert found.place(1).endswith("train.jsonl, row 2")
    both = load_rows("some/data", "train[1:]+test")
    assert both.rows == [LATE, OTHER]
    with pytest.raises(ValueError, match=r'Unknown split "dev"'):
        load_rows("some/data", "dev")


def test_a_later_run_needs_no_network(hub, monkeypatch):
    folder, asked = hub
    (folder / "rows.csv").write_text("text,n\nNA,007\n")
    rows = load_rows("some/data").rows
    assert rows == [{"text": "NA", "n": "007"}]
    before = of_data(find_data("some/data"))
    assert before is not None
    assert (before["name"], before["bytes"]) == ("some/data", 14)

    def offline(name, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset_builder", offline)
    assert load_rows("some/data").rows == rows
    assert of_data(find_data("some/data")) == before
    # What nobody has listed is left to `datasets`, which may have it in its own cache.
    assert load_rows("some/other", revision="v2").rows == [OTHER]
    assert asked[-1] == ("datasets", "some/other", {"split": "train", "revision": "v2"})


@pytest.mark.parametrize("kind", ["parquet", "settings", "text"])
def test_other_kinds_are_read_by_datasets(hub, kind):
    folder, asked = hub
    if kind == "parquet":
        datasets.Dataset.from_list([OTHER]).to_parquet(folder / "rows.parquet")
    elif kind == "text":
        (folder / "rows.txt").write_text("one\ntwo\n")
    else:
        (folder / "rows.csv").write_text("text;n\na;1\n")
        card = "---\nconfigs:\n- config_name: default\n  data_files: '*.csv'\n  sep: ';'\n---\n"
        (folder / "README.md").write_text(card)
    assert load_rows("some/data").rows == [OTHER]
    assert asked[-1] == ("datasets", "some/data", {"split": "train", "revision": None})
    assert of_data(find_data("some/data")) == {"name": "some/data"}


def test_settings_of_a_folder_here_are_kept(tmp_path):
    (tmp_path / "rows.csv").write_text("text;n\na;1\n")
    card = "---\nconfigs:\n- config_name: default\n  data_files: '*.csv'\n  sep: ';'\n---\n"
    (tmp_path / "README.md").write_text(card)
    assert load_rows(str(tmp_path)).columns == ("text", "n")
    (tmp_path / "README.md").unlink()
    (tmp_path / "rows.csv").rename(tmp_path / "rows.tsv")
    (tmp_path / "rows.tsv").write_text("text\tn\na;b\t1\n")
    assert load_rows(str(tmp_path)).rows == [{"text": "a;b", "n": "1"}]
