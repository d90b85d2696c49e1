"""Data that are read while training: index, order, packing, mixtures, positions."""

import csv
import gzip
import json
import logging
import shutil
import tracemalloc
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from experiments.data import DataConfig, load_stream, load_token_data
from experiments.data.data_files import FoundData, find_data
from experiments.data.file_rows import read_file
from experiments.data.hub_rows import iterate_dataset
from experiments.data.indexed_rows import index_rows
from experiments.data.permutation import Permutation, spread
from experiments.data.stream_loading import sample_rows
from experiments.finetune import finetune
from experiments.training import FinetuneConfig
from experiments.training.config import CheckpointConfig
from experiments.training.metrics import read_metrics
from experiments.training.outcome import Outcome
from experiments.training.positions import read_position, save_position
from tests.experiments.shared_steps import share_steps
from tests.tiny import BOS, EOS, make_tokenizer
from tptt_jax.config import LoraConfig

CONFIG = DataConfig(streaming=True, sequence_length=24, eval_rows=0)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(begin=True)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def texts(tmp_path):
    """Fifteen documents of one to 58 words."""
    return write_lines(
        tmp_path / "texts.jsonl", [{"text": f"{n} " + "word " * (n * n // 4)} for n in range(15)]
    )


def stream(config, tokenizer, lanes=4, seed=0, **options):
    return load_stream(config, tokenizer, 0, rows_per_step=lanes, order_seed=seed, **options).train


def batches(source, first, end, lanes=4, part=slice(None)):
    return [source.batch_at(step, lanes, 0, part) for step in range(first, end)]


def joined(found):
    return np.concatenate([np.stack(tuple(batch)) for batch in found], axis=1)


@pytest.mark.parametrize("count", [1, 2, 3, 17, 1000])
def test_an_order_has_every_number_once_and_depends_on_the_seed(count):
    orders = [[order(i) for i in range(count)] for order in (Permutation(count, s) for s in (0, 1))]
    for order in orders:
        assert sorted(order) == list(range(count))
    if count > 10:
        assert orders[0] != orders[1]
        assert orders[0] != sorted(orders[0])


def test_any_stretch_of_rows_has_the_shares():
    found = np.array([spread(row, 5) for row in range(1000)]) < 0.3
    for start in range(0, 1000, 100):
        assert abs(found[start : start + 100].mean() - 0.3) <= 0.02


@pytest.mark.parametrize("end", ["\n", ""])
def test_an_index_finds_every_line_that_holds_something(tmp_path, end):
    lines = ['{"text": "a"}', "", '{"text": "ä\u2028b"}', "{}", '{"text": "c"}']
    file = tmp_path / "rows.jsonl"
    file.write_bytes("\r\n".join(lines).encode() + end.encode())
    rows = index_rows(find_data(str(file)), "train")
    assert [rows.read(i) for i in range(len(rows))] == [json.loads(x) for x in lines if x]
    assert rows.place(2) == (str(file), 3)


def write_kind(path, rows):
    kind = path.name.partition(".")[2]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "csv":
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in rows).encode()))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-16")


@pytest.mark.parametrize("name", ["a.parquet", "a.csv", "a.json", "a.jsonl.gz", "a.jsonl"])
def test_files_of_every_kind_are_read_as_without_streaming(tmp_path, name):
    wanted = [{"question": f"what is {n}", "answer": "a\nb" * n} for n in range(1, 6)]
    write_kind(tmp_path / name, wanted)
    rows = index_rows(find_data(str(tmp_path / name)), "train", most=4)
    assert [rows.read(i) for i in range(len(rows))] == read_file(tmp_path / name).rows[:4]
    assert rows.place(0)[0] == str(tmp_path / name)


def test_what_only_datasets_reads_is_streamed_by_it(tmp_path):
    write_kind(tmp_path / "part.parquet", [{"text": "a"}, {"text": "b"}])
    commit, rows = iterate_dataset(str(tmp_path), "train")
    assert commit is None
    assert list(rows) == [{"text": "a"}, {"text": "b"}]


def test_changed_files_of_a_folder_are_copied_again(tmp_path, monkeypatch):
    card = "---\nconfigs:\n- config_name: default\n  data_files: '*.csv'\n  sep: ';'\n---\n"
    for name in ("one", "other"):
        folder = tmp_path / name / "data"
        folder.mkdir(parents=True)
        (folder / "README.md").write_text(card)
        (folder / "rows.csv").write_text(f"text;n\n{name};1\n")

    def texts():
        found = find_data("data")
        assert found.files is None, "only `datasets` reads another separator"
        rows = index_rows(found, "train")
        return [rows.read(i)["text"] for i in range(len(rows))]

    for name in ("one", "other"):
        monkeypatch.chdir(tmp_path / name)
        assert texts() == [name]
    (tmp_path / "other" / "data" / "rows.csv").write_text("text;n\nchanged;1\n")
    assert texts() == ["changed"]


def test_without_a_network_the_newest_copy_is_read(monkeypatch):
    hub = {"commit": None, "text": ""}

    def iterate(name, split, *, revision):
        assert (name, split) == ("some/data", "train")
        return hub["commit"], iter([{"text": f"{hub['text']} {revision}"}] if hub["text"] else [])

    def text(revision=None):
        found = FoundData(("some/data",), is_hub=True, files=None)
        return index_rows(found, "train", revision).read(0)["text"]

    monkeypatch.setattr("experiments.data.indexed_rows.iterate_dataset", iterate)
    for commit, revision in (("c0ffee", None), ("beef", "v1"), ("facade", None)):
        hub |= {"commit": commit, "text": commit}
        assert text(revision) == f"{commit} {revision}"
    hub |= {"commit": None, "text": ""}
    assert text() == "facade None"
    assert text("v1") == "beef v1"
    with pytest.raises(ValueError, match="has no rows"):
        text("v2")


def test_a_text_becomes_blocks(tmp_path):
    file = tmp_path / "long.txt"
    file.write_text("a line of text\n" * 10_000)
    rows = index_rows(find_data(str(file)), "train")
    assert len(rows) == 3
    assert "".join(rows.read(i)["text"] for i in range(3)) == file.read_text()


def test_every_document_comes_once_in_a_pass(tmp_path, tokenizer):
    file = write_lines(tmp_path / "ids.jsonl", [{"text": f"{n}"} for n in range(20)])
    source = stream(replace(CONFIG, path=str(file), packing=False), tokenizer)
    passes = [joined(batches(source, start, start + 5))[0] for start in (0, 5)]
    texts = [sorted(int(tokenizer.decode(r, skip_special_tokens=True)) for r in p) for p in passes]
    assert texts == [list(range(20))] * 2
    assert not np.array_equal(*passes)


def test_a_long_document_goes_on_in_the_next_row(tmp_path, tokenizer):
    text = " ".join(map(str, range(100)))
    file = write_lines(tmp_path / "one.jsonl", [{"text": text}])
    source = stream(replace(CONFIG, path=str(file)), tokenizer, lanes=1)
    rows = joined(batches(source, 0, 40, lanes=1))
    tokens, segments = rows[0].ravel(), rows[1]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [EOS]
    kept = tokens[(segments.ravel() != 0) & (tokens != BOS)]
    assert kept[: 2 * len(ids)].tolist() == ids * 2
    # Rows are full but for a rest that is too short.
    assert (segments != 0).sum(axis=1).min() > 24 - 8


@pytest.mark.parametrize("packing", [True, False])
def test_rows_do_not_depend_on_the_number_of_processes(texts, tokenizer, packing):
    config = replace(CONFIG, path=str(texts), packing=packing)
    whole = joined(batches(stream(config, tokenizer), 0, 6))
    parts = [
        batches(stream(config, tokenizer), 0, 6, part=part) for part in (slice(0, 1), slice(1, 4))
    ]
    divided = [np.concatenate(pair, axis=1) for pair in zip(*map(_stacks, parts), strict=True)]
    np.testing.assert_array_equal(np.concatenate(divided, axis=1), whole)


def _stacks(found):
    return [np.stack(tuple(batch)) for batch in found]


def test_a_saved_position_continues_with_the_same_rows(texts, tokenizer, tmp_path):
    config = replace(CONFIG, path=str(texts))
    source = stream(config, tokenizer)
    batches(source, 0, 5)
    # Prefetching is ahead of what was trained on.
    save_position(tmp_path, 3, source.position_after(3))
    resumed = stream(config, tokenizer)
    resumed.seek(3, read_position(tmp_path, 3))
    assert resumed.step == 3
    expected = joined(batches(stream(config, tokenizer), 0, 6))[:, 12:]
    np.testing.assert_array_equal(joined(batches(resumed, 3, 6)), expected)
    with pytest.raises(ValueError, match=r"1 data sets and batches of 4 rows, now .* 1 and 2"):
        stream(config, tokenizer, lanes=2).seek(3, read_position(tmp_path, 3))
    with pytest.raises(ValueError, match=r"positions/4.npy, which says where step 4 was in the da"):
        read_position(tmp_path, 4)


def test_each_lane_is_saved_as_the_process_that_reads_it_knows_it(tmp_path, monkeypatch):
    own = np.array([[[5, 3], [0, 0]], [[2, 9], [1, 0]]])
    other = np.array([[[0, 0], [2**33, 7]], [[2, 0], [1, 8]]])

    def gather(array):
        return np.stack([array, other.view(np.int32)])

    monkeypatch.setattr("jax.process_count", lambda: 2)
    monkeypatch.setattr("jax.experimental.multihost_utils.process_allgather", gather)
    save_position(tmp_path, 1, own)
    expected = [[[5, 3], [2**33, 7]], [[2, 9], [1, 8]]]
    np.testing.assert_array_equal(read_position(tmp_path, 1), expected)


def test_data_sets_have_their_shares_of_the_rows(tmp_path, tokenizer):
    paths = []
    for name in ("a", "b"):
        paths.append(str(write_lines(tmp_path / f"{name}.jsonl", [{"text": name * 30}] * 3)))
    config = replace(CONFIG, path=tuple(paths), weights=(3.0, 1.0), packing=False)
    rows = joined(batches(stream(config, tokenizer), 0, 50))[0]
    texts = [tokenizer.decode(row, skip_special_tokens=True).strip()[0] for row in rows]
    assert abs(texts.count("a") - 150) <= 3


def test_prompts_and_answers_are_packed_whole(tmp_path, tokenizer):
    rows = [{"prompt": f"{n}?", "completion": f" {n}!"} for n in range(9)]
    file = write_lines(tmp_path / "pairs.jsonl", rows)
    batch = stream(replace(CONFIG, path=str(file)), tokenizer).batch_at(0, 4, 0)
    for tokens, segments in zip(batch.tokens, batch.segment_ids, strict=True):
        assert segments.max() > 1
        for segment in range(1, segments.max() + 1):
            text = tokenizer.decode(tokens[segments == segment], skip_special_tokens=True)
            assert text in {row["prompt"] + row["completion"] for row in rows}
    assert 0 < batch.loss_mask.sum() < (batch.segment_ids != 0).sum()


def test_a_row_that_cannot_be_used_is_named_and_left_out(tmp_path, tokenizer, caplog):
    file = tmp_path / "bad.jsonl"
    file.write_text('{"text": "good"}\n{"text": 5}\n{"text": "broken}\n')
    source = stream(replace(CONFIG, path=str(file), packing=False), tokenizer, lanes=1)
    with caplog.at_level(logging.WARNING, "tptt_jax.data"):
        rows = joined(batches(source, 0, 4, lanes=1))[0]
    assert {tokenizer.decode(row, skip_special_tokens=True) for row in rows} == {"good"}
    assert f"left out: {file}, row 2: text must be text, got int" in caplog.text
    assert f"left out: {file}, row 3, is not valid JSON" in caplog.text
    strict = stream(replace(CONFIG, path=str(file)), tokenizer, lanes=1, strict=True)
    with pytest.raises(ValueError, match=r"bad.jsonl, row [23]"):
        batches(strict, 0, 4, lanes=1)


@pytest.mark.parametrize("key", ["text", "prompt"])
def test_bad_rows_that_are_held_out_or_fitted_on_are_left_out(key, tmp_path, tokenizer):
    good = {"text": "good"} if key == "text" else {"prompt": "go", "completion": "od"}
    rows = [good, {**good, key: 5}] * 50
    config = replace(CONFIG, path=str(write_lines(tmp_path / "rows.jsonl", rows)), packing=False)
    config = replace(config, eval_rows=DataConfig().eval_rows)
    data = load_stream(config, tokenizer, 0, rows_per_step=4, order_seed=0)
    assert data.eval is not None
    # Of the 5% of 100 rows.
    assert len(data.eval.tokens) + len(data.bad_rows) == 5
    assert data.bad_rows
    assert all(f"{key} must be text, got int" in line for line in data.bad_rows)
    assert f"{len(data.bad_rows)} bad rows left out" in data.describe()
    fitted, bad_rows = sample_rows(config, tokenizer, 0, 10)
    assert len(fitted.tokens) == 10
    assert bad_rows
    assert not set(bad_rows) & set(data.bad_rows)
    for each in (*data.eval.tokens, *fitted.tokens):
        assert tokenizer.decode(each, skip_special_tokens=True) == "good"
    with pytest.raises(ValueError, match=f"{key} must be text, got int"):
        load_stream(config, tokenizer, 0, rows_per_step=4, order_seed=0, strict=True)
    with pytest.raises(ValueError, match=f"{key} must be text, got int"):
        sample_rows(config, tokenizer, 0, 10, strict=True)


def test_a_table_without_a_good_row_says_why(tmp_path, tokenizer):
    file = write_lines(tmp_path / "bad.jsonl", [{"text": 5}] * 20)
    config = replace(CONFIG, path=str(file))
    message = r"bad.jsonl, row \d+: text must be text, got int"
    with pytest.raises(ValueError, match=message):
        sample_rows(config, tokenizer, 0, 10)
    with pytest.raises(ValueError, match=f"1,000 rows of .* cannot be used; the first .*{message}"):
        stream(config, tokenizer).batch_at(0, 4, 0)


def test_conversations_need_a_chat_template_from_the_start(tmp_path, tokenizer):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    file = write_lines(tmp_path / "chat.jsonl", [{"messages": chat}] * 3)
    with pytest.raises(ValueError, match="tokenizer of this model has no chat template"):
        stream(replace(CONFIG, path=str(file)), tokenizer)


def test_rows_without_an_end_are_an_error_not_a_loop(tmp_path, tokenizer):
    file = write_lines(tmp_path / "empty.jsonl", [{"text": ""}])
    with pytest.raises(ValueError, match=r"1,000 rows of .*empty.jsonl in succession have nothing"):
        stream(replace(CONFIG, path=str(file)), tokenizer).batch_at(0, 4, 0)


def test_held_out_rows_are_not_trained_on(tmp_path, tokenizer):
    file = write_lines(tmp_path / "ids.jsonl", [{"text": f"{n}"} for n in range(20)])
    config = replace(CONFIG, path=str(file), packing=False, eval_rows=4)
    data = load_stream(config, tokenizer, 0, rows_per_step=4, order_seed=7)
    assert data.eval is not None
    rows = joined(data.train.batch_at(step, 4, 7) for step in range(4))[0]
    kept, held_out = (
        {tokenizer.decode(row, skip_special_tokens=True) for row in each}
        for each in (rows, data.eval.tokens)
    )
    assert len(kept) == 16
    assert len(held_out) == 4
    assert not kept & held_out


def test_memory_does_not_grow_with_the_data(tmp_path, tokenizer):
    file = write_lines(tmp_path / "large.jsonl", ({"text": "word " * 400} for _ in range(10_000)))
    tracemalloc.start()
    try:
        source = stream(replace(CONFIG, path=str(file)), tokenizer)
        batches(source, 0, 20)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert file.stat().st_size > 20e6
    assert peak < 5e6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": (1.0,)}, "--data.weights mixes .*: add --data.streaming"),
        ({"streaming": True, "path": ("a", "b"), "weights": (1.0,)}, "each of the 2 paths"),
        ({"streaming": True, "path": ("a", "b"), "weights": (1.0, 0.0)}, "must be above 0"),
        ({"streaming": True, "recall": 0.5}, "leave out --data.streaming"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**options)


@pytest.mark.parametrize("options", [{}, {"steps": 5, "epochs": 1.0}])
def test_streaming_needs_a_number_of_steps(options):
    with pytest.raises(ValueError, match=r"give --steps, and leave out --epochs"):
        FinetuneConfig(data=CONFIG, **options)


def test_what_reads_all_rows_refuses_to_stream(texts, tokenizer):
    with pytest.raises(ValueError, match="streaming is for training"):
        load_token_data(replace(CONFIG, path=str(texts)), tokenizer)


def test_a_slice_of_a_split_is_refused(texts):
    with pytest.raises(ValueError, match=r"reads whole splits, not 'train\[:5\]': name one of"):
        index_rows(find_data(str(texts), "train[:5]"), "train[:5]")


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_rows_that_it_had_not_seen(
    texts, tiny_model_dir, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(Outcome, "plot", lambda self: None)
    config = FinetuneConfig(
        model=str(tiny_model_dir),
        output=tmp_path / "whole",
        data=replace(CONFIG, path=str(texts), eval_rows=2),
        no_liza=True,
        lora=LoraConfig(rank=2),
        steps=4,
        checkpoints=CheckpointConfig(checkpoint_every=2),
        sample_tokens=0,
    )
    killed = replace(config, output=tmp_path / "killed")
    with share_steps():
        finetune(config)
        assert "streaming 13 rows of" in capsys.readouterr().out
        shutil.copytree(config.output, killed.output)
        shutil.rmtree(killed.output / "checkpoints" / "4")
        assert finetune(killed)["resumed_at"] == 2
    whole, resumed = (read_metrics(each.output / "metrics.jsonl") for each in (config, killed))
    assert [record.loss for record in resumed] == [record.loss for record in whole]
    assert all(record.wait_seconds is not None for record in resumed)
    names = sorted(file.name for file in (killed.output / "positions").iterdir())
    assert names == ["2.npy", "4.npy"]
    (killed.output / "positions" / "4.npy").unlink()
    with pytest.raises(ValueError, match=r"positions/4.npy, which says where step 4 was"):
        finetune(replace(killed, steps=6))
