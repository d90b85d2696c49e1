"""Questions about text beyond the window, asked with the memory on and off."""

import re
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Int

from experiments.data.recall_rows import Question, passkey_questions
from experiments.data.special_tokens import begin_tokens
from tptt_jax import CausalLM, generate

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedTokenizerFast

_COUNT = 8
_ANSWER_TOKENS = 8


class Answers(NamedTuple):
    """A model's answers to the questions of a run.

    Attributes:
      texts: one for each question, stripped of blanks.
      right: how many of them begin with the expected key.
    """

    texts: list[str]
    right: int


class Questions:
    """Pass keys hidden in held-out text, beyond the window."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerFast",
        haystack: Int[np.ndarray, " L"],
        *,
        length: int,
        window: int,
        seed: int,
    ) -> None:
        """Hides a key in each of eight texts of `length` tokens from `haystack`."""
        self._tokenizer = tokenizer
        self.asked: list[Question] = passkey_questions(
            tokenizer,
            haystack,
            _COUNT,
            length=length,
            window=window,
            seed=seed,
            prefix=begin_tokens(tokenizer),
        )

    def ask(self, model: CausalLM, *, use_memory: bool = True) -> Answers:
        """Asks a model, which answers greedily."""
        prompts = np.stack([question.prompt for question in self.asked])
        result = generate(model, prompts, _ANSWER_TOKENS, use_memory=use_memory)
        rows = zip(np.asarray(result.tokens), np.asarray(result.lengths), strict=True)
        texts = [self._decode(row[:length]) for row, length in rows]
        return Answers(texts, self._right(texts))

    def _decode(self, tokens: Int[np.ndarray, " L"]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True)).strip()

    def _right(self, texts: list[str]) -> int:
        numbers = (re.match(r"\d*", text) for text in texts)
        return sum(
            number is not None and number.group() == question.answer
            for number, question in zip(numbers, self.asked, strict=True)
        )
