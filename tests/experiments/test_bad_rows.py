"""Rows that cannot be read: left out, counted and named, or an error."""

import dataclasses
import json

import pytest

from experiments.data import DataConfig, load_stream, load_token_data, template_process, templates
from experiments.data.bad_rows import BadRows
from tests.tiny import CHATML, make_tokenizer

TOKENIZER = make_tokenizer(begin=True, template=CHATML)
CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
ROWS = {
    "text": ({"text": "fine words"}, {"text": 5}, "text must be text, got int"),
    "alpaca": (
        {"instruction": "a", "output": "b"},
        {"instruction": "a", "output": None},
        "output must be text, got nothing",
    ),
    "chat": (
        {"messages": CHAT},
        {"messages": [*CHAT, {"role": "user", "content": 7}]},
        "content must be text or a list of text parts, got 7",
    ),
}


@pytest.mark.parametrize("kind", ROWS)
def test_bad_rows_are_named_and_leave_the_others_as_they_are(kind, tmp_path):
    good, bad, message = ROWS[kind]

    def load(rows, **options):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = DataConfig(path=str(path), eval_rows=0, packing=False, sequence_length=512)
        return load_token_data(config, TOKENIZER, **options)

    data = load([good, bad, good, bad], strict=False)
    assert [line.rpartition("rows.jsonl, ")[2][:6] for line in data.bad_rows] == [
        "row 2:",
        "row 4:",
    ]
    assert all(message in line for line in data.bad_rows)
    assert "2 bad rows left out" in data.describe()
    assert data.train.tokens.tolist() == load([good, good]).train.tokens.tolist()
    with pytest.raises(ValueError, match=f"row 2: {message}"):
        load([good, bad, good, bad])
    with pytest.raises(ValueError, match=f"row 1: {message}"):
        load([bad, bad], strict=False)


def test_a_wrong_format_is_noticed_early():
    def fail():
        raise ValueError("bad")

    bad = BadRows(strict=False)
    for _ in range(100):
        assert bad.read(fail) is None
    with pytest.raises(ValueError, match="bad"):
        bad.read(fail)
    assert BadRows(strict=False).read(lambda: 3) == 3


def test_rows_are_not_bad_where_no_process_renders_them(tmp_path, monkeypatch):
    def fail(*args, **options):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(templates, "_PROCESS", template_process.TemplateProcess())
    monkeypatch.setattr("subprocess.Popen", fail)
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps({'messages': CHAT})}\n" * 3)
    config = DataConfig(path=str(path), eval_rows=0, sequence_length=512)
    message = r"row \d: the process that renders chat templates cannot be started .*: free some mem"
    with pytest.raises(templates.FatalTemplateError, match=message):
        load_token_data(config, TOKENIZER, strict=False)
    streamed = dataclasses.replace(config, streaming=True)
    source = load_stream(streamed, TOKENIZER, rows_per_step=1, seed=0, order_seed=0).train
    with pytest.raises(templates.FatalTemplateError, match=message):
        source.batch_at(0, 1, 0)
