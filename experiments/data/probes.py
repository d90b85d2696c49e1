"""Things to hide in a text and to ask for at its end: pass keys, needles and pairs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from jaxtyping import Int

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedTokenizerFast

_WORD_LIST = """
amber anchor basil beacon birch bronze candle canyon cedar cobalt copper coral cotton crystal
desert ember falcon feather fern garnet ginger glacier granite harbor hazel heron indigo iron
island ivory jasmine juniper lagoon lantern laurel lemon lilac linen lotus maple marble meadow
mirror nickel oak olive onyx opal orchid otter pearl pebble pepper pine quartz raven reed river
ruby saffron sage silver slate sparrow spruce stone summit thistle thunder tiger topaz tulip
valley velvet violet walnut willow winter wolf zinc
"""
WORDS = tuple(_WORD_LIST.split())
# Tokens between the window's end and what is hidden, at least.
MARGIN = 8
# What the advice in an error leaves room for.
_LONGEST_ANSWER = 8


@dataclass(frozen=True)
class Probe:
    """Something to hide in a text and to ask for at its end."""

    hidden: tuple[str, ...]
    """Sentences to hide, each at a place of its own; the first one holds the answer."""
    question: str
    answer: str
    """Begins with the blank that parts it from the question, and ends where the answer ends."""


def passkey_probe(rng: np.random.Generator) -> Probe:
    """A pass key of four to six digits."""
    return passkey(_number(rng))


def needle_probe(rng: np.random.Generator) -> Probe:
    """One of several magic numbers, each of a thing."""
    count = int(rng.integers(1, 4))
    words = rng.choice(WORDS, count, replace=False).tolist()
    numbers = [_number(rng) for _ in words]
    hidden = tuple(
        f" The magic number of the {word} is {number}. "
        for word, number in zip(words, numbers, strict=True)
    )
    question = (
        f"\nWhat is the magic number of the {words[0]}? The magic number of the {words[0]} is"
    )
    return Probe(hidden, question, f" {numbers[0]}.")


def pairs_probe(rng: np.random.Generator) -> Probe:
    """A list of pairs of words, of which one is asked for."""
    count = int(rng.integers(3, 7))
    words = rng.choice(WORDS, 2 * count, replace=False).tolist()
    pairs = list(zip(words[:count], words[count:], strict=True))
    listed = "".join(f" {left} goes with {right}." for left, right in pairs)
    left, right = pairs[int(rng.integers(count))]
    return Probe((f"{listed} ",), f"\nWhat goes with {left}? {left} goes with", f" {right}.")


ProbeKind = Literal["passkey", "needle", "pairs"]
PROBES: dict[ProbeKind, Callable[[np.random.Generator], Probe]] = {
    "passkey": passkey_probe,
    "needle": needle_probe,
    "pairs": pairs_probe,
}


def encode_text(tokenizer: "PreTrainedTokenizerFast", text: str) -> Int[np.ndarray, " L"]:
    """Tokens of a piece of text, without any that begin one."""
    return np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)


class Prompt(NamedTuple):
    """A text with something hidden in it, and a question at its end."""

    tokens: Int[np.ndarray, " T"]
    places: Int[np.ndarray, " T"]
    """Where each token stands in the haystack; -1 for tokens from elsewhere."""


def hide(
    probe: Probe,
    encode: Callable[[str], Int[np.ndarray, " L"]],
    haystack: Int[np.ndarray, " L"],
    rng: np.random.Generator,
    *,
    length: int,
    window: int = 0,
    depth: float | None = None,
    is_ordered: bool = False,
    prefix: Sequence[int] = (),
    option: str = "--data.sequence-length",
) -> Prompt:
    """A prompt of `length` tokens: text, what it hides, and the question.

    Args:
      probe: what is hidden and asked for.
      encode: from text to tokens, without any that begin a text.
      haystack: tokens of the text.
      rng: chooses the part of the text, and places.
      length: tokens of the prompt.
      window: the first sentence ends at least this many tokens before the answer.
      depth: where it is, from 0, the beginning, to 1; None: anywhere.
      is_ordered: the other sentences come after it, one after the other; False: anywhere.
      prefix: tokens that the prompt begins with.
      option: what sets the length, for the error.

    Raises:
      ValueError: if a prompt of this length cannot hide it so far back.
    """
    start, question = np.asarray(prefix, np.int32), encode(probe.question)
    hidden = [encode(sentence) for sentence in probe.hidden]
    needed = len(start) + len(question) + sum(map(len, hidden))
    room = length - needed
    # Text between the first sentence and the question, at least.
    apart = max(window + MARGIN - len(question), 0)
    if room < apart:
        raise ValueError(
            f"recall rows of {length} tokens cannot hide {needed} tokens behind a window of "
            f"{window}: raise {option} to {needed + apart + _LONGEST_ANSWER} or more."
        )
    first = int(rng.integers(0, len(haystack) - room)) if len(haystack) > room else 0
    text = np.resize(np.arange(first, len(haystack)), room)
    most = room - apart
    place = int(rng.integers(0, most + 1)) if depth is None else round(depth * most)
    others = rng.integers(place if is_ordered else 0, room + 1, len(hidden) - 1).tolist()
    others = sorted(others) if is_ordered else others
    places = sorted([(place, 0), *((at, i) for i, at in enumerate(others, 1))])
    parts, sources, done = [start], [np.full(len(start), -1)], 0
    for here, which in [*places, (room, None)]:
        between = text[done:here]
        put = question if which is None else hidden[which]
        parts += [haystack[between], put]
        sources += [between, np.full(len(put), -1)]
        done = here
    return Prompt(np.concatenate(parts), np.concatenate(sources))


def passkey(key: str) -> Probe:
    """A number that is said twice in a sentence."""
    return Probe(
        (f" The pass key is {key}. Remember it. {key} is the pass key. ",),
        "\nWhat is the pass key? The pass key is",
        f" {key}.",
    )


def _number(rng: np.random.Generator) -> str:
    """Four to six digits."""
    digits = int(rng.integers(4, 7))
    return str(rng.integers(10 ** (digits - 1), 10**digits))
