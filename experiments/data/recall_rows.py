"""Recall rows: something hidden in a haystack, and a question at the end; also for evaluation.

They teach a memory to recall (docs/memory.md). The answer depends on tokens beyond the window; it
counts in the loss, and a haystack of unchanged training text may count, too. Pass keys are asked
for in the words of the evaluation, with keys and places of other seeds; needles in other words.
"""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Int

from experiments.data.packing import Example
from experiments.data.probes import MARGIN, PROBES, Probe, ProbeKind, encode_text, hide, passkey

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedTokenizerFast

# Tokens of a piece of text, at least and less than.
_PIECE = (4, 33)


def recall_examples(
    tokenizer: "PreTrainedTokenizerFast",
    texts: Sequence[Example],
    count: int,
    *,
    length: int,
    window: int,
    seed: int,
    prefix: Sequence[int] = (),
    kinds: Sequence[ProbeKind] = tuple(PROBES),
    weight: float = 0.3,
    count_text: bool = False,
    packing: bool = False,
    option: str = "--data.sequence-length",
) -> list[list[Example]]:
    """Makes rows that ask for things hidden in a text.

    Half of the haystacks are original text, a quarter pieces of it in random order, and a quarter
    random tokens: a model that is trained on one kind recalls from that kind only.

    Args:
      tokenizer: of the model.
      texts: the training data, which haystacks are cut from.
      count: rows.
      length: tokens of a row.
      window: the hidden text ends at least this many tokens before its answer.
      seed: chooses haystacks, depths and what is hidden.
      prefix: tokens that every example begins with.
      kinds: what examples ask for, in turn.
      weight: of a row's answers, relative to all tokens of a text row.
      count_text: tokens of a haystack that is unchanged text count as they do in `texts`.
      option: what sets the length, for the error.
      packing: several examples of different lengths share a row; False: one per row.

    Returns:
      For each of `count` rows its examples, together `length` tokens; their answers share
      `weight` equally.

    Raises:
      ValueError: if rows of this length are too short to hide anything beyond the window.
    """
    haystacks = _Haystacks.of(tokenizer, texts, count_text=count_text)
    encode = functools.partial(encode_text, tokenizer)

    def example(rng: np.random.Generator, probe: Probe, size: int, *, share: float) -> Example:
        answer = encode(probe.answer)
        sizes = {"length": size - len(answer), "window": window, "prefix": prefix}
        haystack = haystacks.draw(rng, size)
        prompt = hide(probe, encode, haystack.tokens, rng, option=option, **sizes)
        weights = np.zeros(size, np.float32)
        text = np.flatnonzero(prompt.places >= 0)
        weights[text] = haystack.targets[prompt.places[text]]
        weights[0] = 0  # nothing predicts it
        weights[len(prompt.tokens) :] = share * weight * length / len(answer)
        return Example(np.concatenate([prompt.tokens, answer]), weights)

    def row(number: int) -> list[Example]:
        rng = np.random.default_rng([seed, number])

        def draw() -> Probe:
            return PROBES[kinds[number % len(kinds)]](rng)

        if not packing:
            return [example(rng, draw(), length, share=1.0)]
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
        return [example(rng, *parts[i], share=1 / len(parts)) for i in order]

    return [row(number) for number in range(count)]


class _Haystacks(NamedTuple):
    """Sources of haystacks: a text, its pieces, and random tokens."""

    text: Example
    vocabulary: Int[np.ndarray, " V"]

    @classmethod
    def of(
        cls,
        tokenizer: "PreTrainedTokenizerFast",
        texts: Sequence[Example],
        *,
        count_text: bool,
    ) -> "_Haystacks":
        tokens = np.concatenate([text.tokens for text in texts])
        targets = np.concatenate([text.targets for text in texts])
        text = Example(tokens, targets.astype(np.float32)) if count_text else _only_tokens(tokens)
        special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        plain = sorted(set(tokenizer.get_vocab().values()) - special)
        return cls(text, np.asarray(plain, np.int32))

    def draw(self, rng: np.random.Generator, size: int) -> Example:
        """A haystack of at least `size` tokens."""
        kind = rng.integers(4)
        if kind < 2:
            return self.text
        if kind == 2:
            return _only_tokens(rng.choice(self.vocabulary, size))
        pieces, found = [], 0
        while found < size:
            start, extent = int(rng.integers(len(self.text.tokens))), int(rng.integers(*_PIECE))
            pieces.append(self.text.tokens[start : start + extent])
            found += len(pieces[-1])
        return _only_tokens(np.concatenate(pieces))


def _only_tokens(tokens: Int[np.ndarray, " L"]) -> Example:
    """Tokens that do not count in the loss."""
    return Example(tokens, np.zeros(len(tokens), np.float32))


def _least_length(
    probe: Probe, encode: Callable[[str], Int[np.ndarray, " L"]], window: int, prefix: int
) -> int:
    """Length of the shortest example of a probe whose answer lies beyond the window."""
    question = len(encode(probe.question))
    hidden = sum(len(encode(sentence)) for sentence in probe.hidden)
    apart = max(window + MARGIN - question, 0)
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
            prompt.tokens, probe.hidden[0].strip(), probe.question.strip(), probe.answer.strip(" .")
        )

    return [ask(number) for number in range(count)]
