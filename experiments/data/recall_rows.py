"""Recall rows: pass keys, needles and pairs hidden in a haystack, and a question at the end.

They teach a memory to recall (docs/memory.md). Only the answer counts in the loss; it depends on
tokens beyond the window. Formats, depths and texts of the evaluation never occur here.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from jaxtyping import Int

from experiments.data.packing import Example

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
# Fewest tokens between the window's end and the hidden text.
_MARGIN = 8
# Tokens of a piece of text: minimum, and maximum plus one.
_PIECE = (4, 33)
# Room for an answer in the length that an error recommends.
_LONGEST_ANSWER = 8


@dataclass(frozen=True)
class Probe:
    """Sentences to hide in a text, and a question to ask at its end."""

    hidden: tuple[str, ...]
    """Sentences to hide at separate places; the first one holds the answer."""
    question: str
    answer: str
    """The answer, with the blank before it."""


def passkey_probe(rng: np.random.Generator) -> Probe:
    """A pass key of four to six digits."""
    return passkey(_number(rng))


def needle_probe(rng: np.random.Generator) -> Probe:
    """One of several magic numbers, each belonging to a word."""
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
    """A list of word pairs and a question about one of them."""
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


def recall_examples(
    tokenizer: "PreTrainedTokenizerFast",
    texts: Sequence[Int[np.ndarray, " L"]],
    count: int,
    *,
    length: int,
    window: int,
    seed: int,
    prefix: Sequence[int] = (),
    kinds: Sequence[ProbeKind] = tuple(PROBES),
    weight: float = 0.3,
    packing: bool = False,
) -> list[list[Example]]:
    """Makes rows that ask for things hidden in a text.

    Half of the haystacks are original text, a quarter pieces of it in random order, and a quarter
    random tokens: a model that is trained on one kind recalls from that kind only.

    Args:
      tokenizer: of the model.
      texts: tokens of the training data, which haystacks are cut from.
      count: rows.
      length: tokens of a row.
      window: the hidden text ends at least this many tokens before its answer.
      seed: chooses haystacks, depths and what is hidden.
      prefix: tokens that every example begins with.
      kinds: what examples ask for, in turn.
      weight: of a row's answers, relative to all tokens of a text row.
      packing: several examples of different lengths share a row; False: one per row.

    Returns:
      For each of `count` rows its examples, together `length` tokens; their answers share the
      weight of the row equally.

    Raises:
      ValueError: if rows of this length are too short to hide anything beyond the window.
    """
    haystacks = _Haystacks.of(tokenizer, texts)
    encode = functools.partial(encode_text, tokenizer)

    def example(rng: np.random.Generator, probe: Probe, size: int) -> Example:
        answer = encode(probe.answer)
        sizes = {"length": size - len(answer), "window": window, "prefix": prefix}
        prompt = hide(probe, encode, haystacks.draw(rng, size), rng, **sizes)
        weights = np.zeros(size, np.float32)
        weights[len(prompt) :] = weight * length / len(answer)
        return Example(np.concatenate([prompt, answer]), weights)

    def row(number: int) -> list[Example]:
        rng = np.random.default_rng([seed, number])

        def draw() -> Probe:
            return PROBES[kinds[number % len(kinds)]](rng)

        if not packing:
            return [example(rng, draw(), length)]
        parts: list[tuple[Probe, int]] = []
        free = length
        while free:
            probe = draw()
            least = _least_length(probe, encode, window, len(prefix))
            if parts and least > free:
                parts[-1] = (parts[-1][0], parts[-1][1] + free)
                break
            size = _draw_length(rng, least, length)
            parts.append((probe, min(size, free)))
            free -= parts[-1][1]
        order = rng.permutation(len(parts))
        made = [example(rng, *parts[i]) for i in order]
        return [Example(tokens, targets / len(made)) for tokens, targets in made]

    return [row(number) for number in range(count)]


class _Haystacks(NamedTuple):
    """Sources of haystacks: a text, its pieces, and random tokens."""

    text: Int[np.ndarray, " L"]
    vocabulary: Int[np.ndarray, " V"]

    @classmethod
    def of(
        cls, tokenizer: "PreTrainedTokenizerFast", texts: Sequence[Int[np.ndarray, " L"]]
    ) -> "_Haystacks":
        text = np.concatenate([np.asarray(text, np.int32) for text in texts])
        special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        plain = sorted(set(tokenizer.get_vocab().values()) - special)
        return cls(text, np.asarray(plain, np.int32))

    def draw(self, rng: np.random.Generator, size: int) -> Int[np.ndarray, " L"]:
        """A haystack of at least `size` tokens."""
        kind = rng.integers(4)
        if kind < 2:
            return self.text
        if kind == 2:
            return rng.choice(self.vocabulary, size)
        pieces, found = [], 0
        while found < size:
            start, extent = int(rng.integers(len(self.text))), int(rng.integers(*_PIECE))
            pieces.append(self.text[start : start + extent])
            found += len(pieces[-1])
        return np.concatenate(pieces)


def _least_length(
    probe: Probe, encode: Callable[[str], Int[np.ndarray, " L"]], window: int, prefix: int
) -> int:
    """Length of the shortest example of a probe whose answer lies beyond the window."""
    question = len(encode(probe.question))
    hidden = sum(len(encode(sentence)) for sentence in probe.hidden)
    apart = max(window + _MARGIN - question, 0)
    return prefix + hidden + apart + question + len(encode(probe.answer))


def _draw_length(rng: np.random.Generator, least: int, most: int) -> int:
    """A length from `least` to `most`, with as many tokens in examples of each octave."""
    if most <= least:
        return least
    share = rng.random()
    return int(1 / ((1 - share) / least + share / most))


class Question(NamedTuple):
    """A pass key hidden in a text, and the question for it at the end."""

    prompt: Int[np.ndarray, " T"]
    hidden: str
    question: str
    answer: str
    """The digits alone."""


def passkey_questions(
    tokenizer: "PreTrainedTokenizerFast",
    haystack: Int[np.ndarray, " L"],
    count: int,
    *,
    length: int,
    window: int,
    seed: int,
    prefix: Sequence[int] = (),
) -> list[Question]:
    """Questions about pass keys of five digits in held-out texts.

    Args:
      tokenizer: of the model.
      haystack: tokens of the texts.
      count: questions.
      length: tokens of each prompt.
      window: the key ends at least this many tokens before the answer.
      seed: chooses texts, depths and keys.
      prefix: tokens that every prompt begins with.

    Raises:
      ValueError: if prompts of this length are too short to hide a key beyond the window.
    """

    def ask(number: int) -> Question:
        # Seeds of three numbers: no training row uses such a seed.
        rng = np.random.default_rng([seed, number, 1])
        probe = passkey(str(rng.integers(10_000, 100_000)))
        encode = functools.partial(encode_text, tokenizer)
        prompt = hide(probe, encode, haystack, rng, length=length, window=window, prefix=prefix)
        return Question(
            prompt, probe.hidden[0].strip(), probe.question.strip(), probe.answer.strip(" .")
        )

    return [ask(number) for number in range(count)]


def encode_text(tokenizer: "PreTrainedTokenizerFast", text: str) -> Int[np.ndarray, " L"]:
    """Tokens of a piece of text, without special tokens."""
    return np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)


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
) -> Int[np.ndarray, " T"]:
    """A prompt of `length` tokens: text with hidden sentences, and the question.

    Args:
      probe: the sentences and the question.
      encode: from text to tokens, without special tokens.
      haystack: tokens of the text.
      rng: chooses the part of the text, and the places.
      length: tokens of the prompt.
      window: the first sentence ends at least this many tokens before the answer.
      depth: place of the first sentence, from 0, the beginning, to 1; None: anywhere.
      is_ordered: the other sentences follow it in order; False: they stand anywhere.
      prefix: tokens that the prompt begins with.

    Raises:
      ValueError: if a prompt of this length is too short.
    """
    start, question = np.asarray(prefix, np.int32), encode(probe.question)
    hidden = [encode(sentence) for sentence in probe.hidden]
    needed = len(start) + len(question) + sum(map(len, hidden))
    room = length - needed
    # Fewest tokens of text between the first sentence and the question.
    apart = max(window + _MARGIN - len(question), 0)
    if room < apart:
        raise ValueError(
            f"recall rows of {length} tokens cannot hide {needed} tokens behind a window of "
            f"{window}: raise --data.sequence-length to {needed + apart + _LONGEST_ANSWER} or more."
        )
    first = int(rng.integers(0, len(haystack) - room)) if len(haystack) > room else 0
    text = np.resize(haystack[first:], room)
    most = room - apart
    place = int(rng.integers(0, most + 1)) if depth is None else round(depth * most)
    others = rng.integers(place if is_ordered else 0, room + 1, len(hidden) - 1).tolist()
    others = sorted(others) if is_ordered else others
    places = sorted([(place, 0), *((at, i) for i, at in enumerate(others, 1))])
    parts, done = [start], 0
    for here, which in places:
        parts += [text[done:here], hidden[which]]
        done = here
    return np.concatenate([*parts, text[done:], question])


def passkey(key: str) -> Probe:
    """Hides a key, which the text states twice."""
    return Probe(
        (f" The pass key is {key}. Remember it. {key} is the pass key. ",),
        "\nWhat is the pass key? The pass key is",
        f" {key}.",
    )


def _number(rng: np.random.Generator) -> str:
    """Four to six digits."""
    digits = int(rng.integers(4, 7))
    return str(rng.integers(10 ** (digits - 1), 10**digits))
