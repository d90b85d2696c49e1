"""Data paths: files of any size and compression, folders, patterns; others are refused."""

import csv
import gzip
import json
import os
import socket
import tarfile
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from experiments.command_line import parse_arguments, read_yaml
from experiments.data import DataConfig, load_token_data, text_files
from experiments.data.data_files import find_data
from experiments.data.prompts import read_text
from experiments.data.rows import load_rows
from experiments.finetune import run_finetune
from experiments.training import FinetuneConfig
from tests.tiny import make_tokenizer

PADDING = "hello world " * 4000
LATE = {"text": "late", "date": "2024-05-01", "meta": {"name": "bot"}, "count": "7"}


def lines(*rows: dict) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write_table(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="") as file:
            writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writerow(rows[0])
            writer.writerows([row.values() for row in rows])
    else:
        path.write_bytes(json.dumps(rows).encode() if path.suffix == ".json" else lines(*rows))
    return path


# --- each row keeps its own keys ---------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_keys_may_appear_after_ten_megabytes(tmp_path, suffix):
    first = {"text": PADDING, "count": 1, "meta": {}}
    path = write_table(tmp_path / f"big{suffix}", [first] * 230 + [LATE])
    assert path.stat().st_size > 11_000_000
    rows = load_rows(str(path))
    assert rows.rows == [first] * 230 + [LATE]
    assert rows.columns == ("text", "count", "meta", "date")


def test_parquet_rows_have_no_nulls(tmp_path):
    path = write_table(tmp_path / "t.parquet", [LATE | dict.fromkeys(LATE) | A, LATE])
    rows = load_rows(str(path)).rows
    assert rows == [{"text": "a"}, LATE]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_texts_stay_texts_in_every_kind_of_file(tmp_path, suffix):
    values = ["2024-05-01", "12", "1e5", "NaN", "NA", "null", "True", "", " x ", '"q" \t,', "a\nb"]
    rows = [{"text": value, "other": "1"} for value in values]
    assert load_rows(str(write_table(tmp_path / f"t{suffix}", rows))).rows == rows


def test_csv_that_would_lose_quotes_or_columns_is_refused(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text('text,b\na,"x"y\n')
    with pytest.raises(ValueError, match=r"t\.csv, line 2, is not valid CSV"):
        load_rows(str(path))
    path.write_text('text,b\na,"x\n')
    with pytest.raises(ValueError, match=r"t\.csv, line 2, is not valid CSV"):
        load_rows(str(path))
    path.write_text("text,text\na,b\n")
    with pytest.raises(ValueError, match="several columns named 'text'"):
        load_rows(str(path))


# --- several files -----------------------------------------------------------------------------

A, B, C = ({"text": name} for name in "abc")


def texts(path, **settings) -> list[str]:
    return [row["text"] for row in load_rows(path, **settings).rows]


def test_files_folders_and_patterns_follow_one_another(tmp_path):
    (tmp_path / "deep").mkdir()
    one = write_table(tmp_path / "a.jsonl", [A, B])
    two = write_table(tmp_path / "deep" / "b[1].csv", [C])
    assert texts([str(one), str(two)]) == ["a", "b", "c"]
    assert texts(f"{tmp_path}/**/*.*") == ["a", "b", "c"]
    assert texts([f"{tmp_path}/*.jsonl", str(two)], max_rows=2) == ["a", "b"]
    assert texts([str(one), str(two)], split="train[1:]") == ["b", "c"]
    assert texts(str(two)) == ["c"]
    with pytest.raises(FileNotFoundError, match=r"No file matches .*none"):
        load_rows(f"{tmp_path}/none*.jsonl")


def test_rows_are_named_by_their_file(tmp_path):
    one = write_table(tmp_path / "a.jsonl", [A, B])
    two = write_table(tmp_path / "b.jsonl", [A, {"text": 5}])
    rows = load_rows([str(one), str(two)], split="train[1:]")
    assert [rows.place(i) for i in range(3)] == [f"{one}, row 2", f"{two}, row 1", f"{two}, row 2"]
    with pytest.raises(ValueError, match=r"b\.jsonl, row 2: text must be text"):
        load_token_data(DataConfig(path=(str(one), str(two))), make_tokenizer(begin=True))


def test_a_folder_has_splits_and_each_row_its_keys(tmp_path):
    write_table(tmp_path / "train.jsonl", [A, LATE])
    write_table(tmp_path / "test.jsonl", [B])
    assert load_rows(str(tmp_path)).rows == [A, LATE]
    assert texts(str(tmp_path), split="test") == ["b"]
    assert texts(str(tmp_path), split="train[:1]+test") == ["a", "b"]
    with pytest.raises(ValueError, match=r'Unknown split "dev"'):
        load_rows(str(tmp_path), split="dev")


def test_a_folder_of_zst_files_has_splits(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "train.jsonl.zst").write_bytes(zstd(lines(A, LATE)))
    (tmp_path / "deep" / "test.jsonl.zst").write_bytes(zstd(lines(B)))
    (tmp_path / "README.md").write_text("About the rows.\n")
    assert texts(str(tmp_path)) == ["a", "late"]
    assert texts(str(tmp_path), split="test") == ["b"]
    assert texts(str(tmp_path), split="train[1:]+test") == ["late", "b"]
    (tmp_path / "deep" / "test.jsonl").write_bytes(lines(C))
    with pytest.raises(ValueError, match=r"test\.jsonl and .*test\.jsonl\.zst have the same name"):
        load_rows(str(tmp_path))


def test_what_lies_below_the_run_is_no_data(tmp_path):
    write_table(tmp_path / "rows.csv", [A])
    run = tmp_path / "run"
    run.mkdir()
    for name in ("x", "y", "z"):
        write_table(run / f"{name}.jsonl", [B])
    for path in (str(tmp_path), f"{tmp_path}/**/*.*"):
        found = find_data(path, leave_out=run)
        assert found.files == {"train": [tmp_path / "rows.csv"]}
        assert texts(path, files=found) == ["a"]


def test_one_text_has_no_rows_to_slice(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    for path in (str(tmp_path / "a.txt"), str(tmp_path), "python-docs"):
        with pytest.raises(
            ValueError, match=r"is one text and .*--data\.split train\[:1\]\): lower"
        ):
            load_rows(path, split="train[:1]")
    with pytest.raises(ValueError, match=r"^python-docs must be given alone\.$"):
        load_rows(["python-docs", str(tmp_path / "a.txt")])


def test_csv_as_spreadsheets_write_it(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("\n,,,\ntext,b,,\na,1,,\n,2,,\n")
    assert load_rows(str(path)).rows == [{"text": "a", "b": "1"}, {"text": "", "b": "2"}]
    path.write_text("text,b,,\na,1,,\nb,2,x,\n")
    with pytest.raises(ValueError, match="line 3, has a value in a column without a name"):
        load_rows(str(path))


def test_several_texts_are_documents_of_their_own(tmp_path):
    for name, text in (("a.txt", "one\n\ntwo\n"), ("b.txt", "three")):
        (tmp_path / name).write_text(text)
    assert texts(f"{tmp_path}/*.txt") == texts(str(tmp_path)) == ["one\n\ntwo\n", "three"]
    write_table(tmp_path / "c.jsonl", [A])
    with pytest.raises(ValueError, match="names texts and tables"):
        load_rows(f"{tmp_path}/*")


def test_flags_and_yaml_take_several_files(tmp_path):
    def parse(*argv):
        return parse_arguments(argv, FinetuneConfig).data

    columns = ("prompt=q", "completion=a")
    expected = DataConfig(path=("a.jsonl", "b.jsonl"), columns=columns)
    flags = ["--data", "a.jsonl", "b.jsonl", "--data.columns", *columns, "--steps", "1"]
    assert parse(*flags) == expected
    config = tmp_path / "c.yaml"
    config.write_text(f"data: {{path: [a.jsonl, b.jsonl], columns: [{', '.join(columns)}]}}")
    assert parse("--config", str(config)) == expected
    config.write_text("data: [a.jsonl, b.jsonl]")
    assert parse("--config", str(config)).path == ("a.jsonl", "b.jsonl")
    assert parse("--data", "a.jsonl").path == "a.jsonl"
    config.write_text("fit: {data: [a.txt, b.txt]}")
    for flags in (["--fit-data", "a.txt", "b.txt"], ["--config", str(config)]):
        assert parse_arguments(flags, FinetuneConfig).fit.data == ("a.txt", "b.txt")
    assert parse_arguments(["--fit-data", "a.txt"], FinetuneConfig).fit.data == "a.txt"
    assert parse_arguments([], FinetuneConfig).fit.data is None


def test_a_revision_is_of_the_hub(tmp_path, monkeypatch):
    import datasets

    path = write_table(tmp_path / "a.jsonl", [A])
    with pytest.raises(ValueError, match=r"--data\.revision v1 is for datasets on the Hugging"):
        load_rows(str(path), revision="v1")
    asked = {}

    def load_dataset(name, **options):
        asked.update(options, name=name)
        return datasets.Dataset.from_list([A, B])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert texts("nobody/nothing", revision="v1") == ["a", "b"]
    assert asked == {"name": "nobody/nothing", "split": "train", "revision": "v1"}


# --- compression and encodings -----------------------------------------------------------------


def zstd(content: bytes) -> bytes:
    return pa.compress(content, codec="zstd", asbytes=True)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".tsv", ".txt"])
def test_compressed_files_read_as_they_were(tmp_path, kind, suffix):
    plain = tmp_path / f"t{kind}"
    plain.write_text("text\ta\n") if kind == ".txt" else write_table(plain, [A, B])
    squeeze = gzip.compress if suffix == ".gz" else zstd
    path = tmp_path / f"t{kind}{suffix}"
    # Parts of a file may be compressed one by one.
    path.write_bytes(squeeze(plain.read_bytes()[:7]) + squeeze(plain.read_bytes()[7:]))
    assert load_rows(str(path)).rows == load_rows(str(plain)).rows
    if kind == ".txt":
        assert "".join(read_text(path)) == plain.read_text()
    folder = tmp_path / "folder"
    folder.mkdir()
    path.rename(folder / path.name)
    assert load_rows(str(folder)).rows == load_rows(str(plain)).rows


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_damaged_files_are_one_line(tmp_path, suffix):
    content = (gzip.compress if suffix == ".gz" else zstd)(lines(A, B) * 1000)
    path = tmp_path / f"t.jsonl{suffix}"
    for damaged in (content[:-9], b"x" * 50, content[:20] + b"\0\0\0\0" + content[24:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"t\.jsonl\{suffix}") as caught:
            load_rows(str(path))
        assert "\n" not in str(caught.value)


def test_zstandard_without_a_library_names_one(tmp_path, monkeypatch):
    (tmp_path / "t.jsonl.zst").write_bytes(zstd(lines(A)))
    monkeypatch.setattr(text_files.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install zstandard"):
        load_rows(str(tmp_path / "t.jsonl.zst"))


def test_parquet_is_not_compressed_again(tmp_path):
    (tmp_path / "t.parquet.gz").write_bytes(gzip.compress(b"PAR1"))
    with pytest.raises(ValueError, match=r"all but \.parquet may end in \.gz"):
        load_rows(str(tmp_path / "t.parquet.gz"))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".txt"])
def test_byte_order_marks_name_the_encoding(tmp_path, kind, encoding):
    path = tmp_path / f"t{kind}"
    text = {".csv": "text\ncafé\n", ".txt": "café"}.get(kind, '{"text": "café"}\n')
    path.write_bytes(text.encode(encoding))
    assert texts(str(path)) == ["café"]
    if kind == ".txt":
        assert list(read_text(path)) == ["café"]


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".txt"])
def test_what_cannot_be_decoded_is_named_by_its_line(tmp_path, kind, suffix, monkeypatch):
    monkeypatch.setattr(text_files, "_PIECE", 64)
    row, bad = {".jsonl": (b"{}\n", b'{"a": "caf\xe9"}\n')}.get(kind, (b"a\n", b"caf\xe9\n"))
    content = row * 41 + bad + row
    path = tmp_path / f"t{kind}{suffix}"
    path.write_bytes(gzip.compress(content) if suffix else content)
    for read in (load_rows, lambda name: list(read_text(Path(name)))):
        with pytest.raises(ValueError, match=rf"{path.name}, line 42, is not UTF-8 text"):
            read(str(path))


def test_archives_are_not_text(tmp_path):
    lines_of = tmp_path / "rows.jsonl"
    lines_of.write_text("a\n")
    path = tmp_path / "rows.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        archive.add(lines_of, "rows.jsonl")
    with pytest.raises(ValueError, match=r"rows\.tar\.gz, line 1, holds a zero byte.*unpack arch"):
        load_rows(str(path))


def test_utf_16_without_a_mark_is_refused(tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes("some text".encode("utf-16-le"))
    with pytest.raises(ValueError, match="UTF-16 without a byte-order mark"):
        load_rows(str(path))


# --- what is no data ---------------------------------------------------------------------------


def test_special_files_are_refused_at_once(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "fifo.jsonl")
    os.symlink("/dev/zero", tmp_path / "zero.jsonl")
    with socket.socket(socket.AF_UNIX) as served:
        monkeypatch.chdir(tmp_path)  # names of sockets must be short
        served.bind("s.jsonl")
        paths = ["/dev/zero", "/dev/null", *map(str, tmp_path.iterdir())]
        paths += [str(tmp_path), f"{tmp_path}/*.jsonl"]
        for path in paths:
            with pytest.raises(ValueError, match="is a device, a pipe or a socket") as caught:
                load_rows(path)
            assert "\n" not in str(caught.value)


def test_deep_nesting_is_one_line(tmp_path):
    deep = "[" * 10_000 + "]" * 10_000
    path = tmp_path / "t.jsonl"
    path.write_text(f'{{"text": "a"}}\n{{"text": {deep}}}\n')
    with pytest.raises(ValueError, match=r"t\.jsonl, line 2, is nested too deeply"):
        load_rows(str(path))
    path = path.rename(tmp_path / "t.json")
    path.write_text(deep)
    with pytest.raises(ValueError, match=r"t\.json is nested too deeply"):
        load_rows(str(path))
    path = path.rename(tmp_path / "t.yaml")
    path.write_text(f"data: {deep}")
    with pytest.raises(ValueError, match=r"t\.yaml is nested too deeply"):
        read_yaml(path)


def test_numbers_that_python_does_not_read_are_one_line(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text(f'{{"text": "a"}}\n{{"id": {"9" * 5000}}}\n')
    with pytest.raises(ValueError, match=r"t\.jsonl, line 2, holds a number of over 4,300 digits"):
        load_rows(str(path))


def test_a_batch_larger_than_the_data_is_said(tmp_path):
    path = write_table(tmp_path / "a.jsonl", [A, B, C])
    config = DataConfig(path=str(path), eval_rows=0, packing=False)
    data = load_token_data(config, make_tokenizer(begin=True))
    assert "fewer rows than a step of 4, which repeats them" in data.describe(4)
    assert "fewer rows" not in data.describe(3)


def test_commands_refuse_data_with_status_2(tmp_path, capsys):
    os.mkfifo(tmp_path / "fifo.jsonl")

    def read(config: FinetuneConfig) -> None:
        load_rows(config.data.path)

    assert run_finetune(read, ["--data", str(tmp_path / "fifo.jsonl")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
