"""Incremental decoding of text, against decoding all tokens at once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny import make_tokenizer
from tptt_jax.inference.text import TextStream


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(begin=False)


def run(decode, tokens, stops, sizes=(1,)):
    """Pushes pieces of these sizes in turn; returns the pieces of text and the stream."""
    stream, out, place, number = TextStream(decode, stops), [], 0, 0
    while place < len(tokens):
        size = sizes[number % len(sizes)]
        out.append(stream.push(tokens[place : place + size]))
        place, number = place + size, number + 1
    return [*out, stream.finish()], stream


@pytest.mark.parametrize("text", ["Grüße, 世界 🙂🙂!", "a  b\n\n c", "🙂", ""], ids=repr)
@pytest.mark.parametrize("sizes", [(1,), (3, 1), (100,)], ids=str)
def test_nothing_is_lost_and_no_character_is_torn(text, sizes, tokenizer):
    tokens = tokenizer(text)["input_ids"]
    pieces, stream = run(tokenizer.decode, tokens, (), sizes)
    assert "".join(pieces) == stream.text == text
    assert "\ufffd" not in "".join(pieces)


def test_a_torn_character_at_the_end_is_shown(tokenizer):
    tokens = tokenizer("ab🙂")["input_ids"][:-1]
    assert run(tokenizer.decode, tokens, ())[1].text == tokenizer.decode(tokens)


@given(
    st.text("abc", max_size=30),
    st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.integers(1, 5), min_size=1, max_size=4),
)
def test_the_cut_is_where_a_search_in_the_whole_text_finds_it(text, stops, sizes):
    tokens = list(map(ord, text))

    def decode(tokens):
        return "".join(map(chr, tokens))

    pieces, stream = run(decode, tokens, tuple(stops), sizes)
    # The first stop string to be complete ends the text; of several, the longest.
    ends = [
        (end, min(end - len(stop) for stop in stops if text[:end].endswith(stop)))
        for end in range(len(text) + 1)
        if any(text[:end].endswith(stop) for stop in stops)
    ]
    assert stream.stopped == bool(ends)
    assert "".join(pieces) == stream.text == (text[: ends[0][1]] if ends else text)
    assert stream.num_tokens == (ends[0][0] if ends else len(text))


def test_stop_strings_that_span_tokens(tokenizer):
    tokens = tokenizer("one two three")["input_ids"]
    _, stream = run(tokenizer.decode, tokens, ("o thr",), (7,))
    assert stream.text == "one tw"
    assert stream.stopped
    assert "o thr" in tokenizer.decode(tokens[: stream.num_tokens])
    assert "o thr" not in tokenizer.decode(tokens[: stream.num_tokens - 1])


@pytest.mark.parametrize("stops", [("",), ("a", ""), "ab"], ids=repr)
def test_empty_stop_strings_are_refused(stops):
    with pytest.raises(ValueError, match="non-empty"):
        TextStream(str, stops)
