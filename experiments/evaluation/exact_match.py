"""Exact match of a generated answer, in the three variants of LightEval that TPTT reports.

github.com/huggingface/lighteval: `exact_match`, `prefix_exact_match`, `prefix_quasi_exact_match`.
"""

import re
import string

_ARTICLES = re.compile(r"\b(a|an|the)\b")


def exact_match(answer: str, gold: str) -> bool:
    """EM: both are equal up to surrounding space; an empty answer is never right."""
    return bool(answer) and answer.strip() == gold.strip()


def prefix_exact_match(answer: str, gold: str) -> bool:
    """PEM: the answer begins with the gold text."""
    return bool(answer) and answer.strip().startswith(gold.strip())


def prefix_quasi_exact_match(answer: str, gold: str) -> bool:
    """PQEM: the answer begins with the gold text after both are normalized.

    Articles are removed, so the gold letter A becomes empty and every answer matches it.
    """
    return bool(answer) and normalize_answer(answer).startswith(normalize_answer(gold))


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation, articles and extra space; numbers as Python writes floats.

    Example:
      >>> normalize_answer("The  answer: 7,000 well-known (B)")
      'answer 7000.0 well known b'
    """
    words = []
    for word in re.split("[ -]", text.lower()):
        bare = "".join(letter for letter in word if letter not in string.punctuation)
        words += _ARTICLES.sub(" ", _number(bare)).split()
    return " ".join(words)


def _number(word: str) -> str:
    try:
        return str(float(word))
    except ValueError:
        return word
