"""Adapts a model of ours to EleutherAI's lm-evaluation-harness (lm-eval)."""

import itertools
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import jax
import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from experiments.data.templates import ChatTemplate
from experiments.evaluation.likelihood import Continuation, pad_prompts, score_continuations
from tptt_jax import CausalLM, generate

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedTokenizerFast

_NEW_TOKENS = 256
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


class _Generation(NamedTuple):
    """Generation settings of some requests."""

    until: list[str]
    max_new_tokens: int
    sampling: dict[str, Any]


class HarnessModel(TemplateLM):
    """Scores and continues texts as lm-eval's own backend for transformers does.

    Contexts that are too long lose their beginning, and texts without a context begin with the
    tokenizer's beginning-of-sequence token.
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: "PreTrainedTokenizerFast",
        *,
        use_memory: bool,
        batch_size: int = 8,
        max_length: int | None = None,
    ) -> None:
        """Wraps a model.

        Args:
          model: a base model or a Titan.
          tokenizer: of the model.
          use_memory: False leaves the memory out.
          batch_size: most rows at a time.
          max_length: most tokens of a text that the model reads; None: all positions of its
            configuration.

        Raises:
          ValueError: if the tokenizer has neither a beginning- nor an end-of-sequence token.
        """
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.use_memory, self.batch_size = use_memory, batch_size
        self.max_length = max_length or model.config.max_positions
        ids = cast("tuple[int | None, ...]", (tokenizer.bos_token_id, tokenizer.eos_token_id))
        known = [token for token in ids if token is not None]
        if not known:
            raise ValueError(
                "the tokenizer has neither a beginning-of-sequence nor an end-of-sequence token: "
                "lm-eval needs one for texts without a context."
            )
        self._first, self._end = known[0], known[-1]

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token."""
        return self._end

    @property
    def prefix_token_id(self) -> int:
        """The first token of a text without a context."""
        return self._first

    @property
    def tokenizer_name(self) -> str:
        """The key for lm-eval's cache of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Turns into one text, by the tokenizer's template."""
        return ChatTemplate(self.tokenizer).render(
            chat_history, ask=add_generation_prompt, go_on=not add_generation_prompt
        )

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Tokens of a text, with those that the tokenizer adds unless the text begins with them."""
        del kwargs
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(str(self.tokenizer.decode([self._first])))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy decoding gives it) of each continuation."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        del kwargs
        with tqdm(total=len(requests), desc="log-likelihoods") as bar:
            found = score_continuations(
                self.model,
                [Continuation(context, tokens) for _, context, tokens in requests],
                batch_size=self.batch_size,
                max_length=self.max_length,
                use_memory=self.use_memory,
                report=bar.update,
            )
        return [(each.nats, each.is_greedy) for each in found]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        """Log-likelihood of each whole text, in windows of `max_length` tokens."""
        del disable_tqdm
        windows = [[*self._windows(*request.args)] for request in requests]
        flat = [(None, *window) for some in windows for window in some]
        found = iter(self._loglikelihood_tokens(flat))
        return [sum(nats for nats, _ in itertools.islice(found, len(each))) for each in windows]

    def _windows(self, text: str) -> Iterator[tuple[list[int], list[int]]]:
        pairs = get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        return map(make_disjoint_window, pairs)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Generates after each context, up to the first stop string."""
        del disable_tqdm
        groups: defaultdict[str, list[int]] = defaultdict(list)
        asked = [cast("tuple[str, dict[str, Any]]", request.args) for request in requests]
        for index, (_, kwargs) in enumerate(asked):
            groups[json.dumps(kwargs, sort_keys=True)].append(index)
        answers = [""] * len(requests)
        with tqdm(total=len(requests), desc="answers") as bar:
            for indices in groups.values():
                settings = self._generation(asked[indices[0]][1])
                prompts = {i: self._prompt(asked[i][0], settings) for i in indices}
                order = sorted(indices, key=lambda i: -len(prompts[i]))
                size = min(self.batch_size, len(order))
                for start in range(0, len(order), size):
                    some = order[start : start + size]
                    texts = self._answers([prompts[i] for i in some], settings, size, start)
                    for index, text in zip(some, texts, strict=True):
                        answers[index] = text
                    bar.update(len(some))
        return answers

    def _generation(self, kwargs: dict[str, Any]) -> _Generation:
        settings: dict[str, Any] = {**normalize_gen_kwargs(kwargs, _NEW_TOKENS)}
        end = str(self.tokenizer.decode([self._end]))
        until = handle_stop_sequences(settings.pop("until"), eos=end)
        max_new_tokens = settings.pop("max_gen_toks")
        if not settings.pop("do_sample"):
            settings["temperature"] = 0.0
        beams = settings.pop("num_beams", 1)
        unknown = [name for name in settings if name not in _SAMPLING]
        if beams != 1 or unknown:
            raise ValueError(
                f"this task generates with {', '.join(unknown) or 'beams'}, which is not supported:"
                f" only do_sample, {', '.join(_SAMPLING)} are."
            )
        if max_new_tokens >= self.max_length:
            raise ValueError(
                f"{max_new_tokens} new tokens leave no room for a context in {self.max_length} "
                "tokens: raise --harness.max-length."
            )
        return _Generation([stop for stop in until if stop], max_new_tokens, settings)

    def _prompt(self, text: str, settings: _Generation) -> list[int]:
        tokens = self.tok_encode(text) or [self.prefix_token_id]
        return tokens[-(self.max_length - settings.max_new_tokens) :]

    def _answers(
        self, prompts: Sequence[list[int]], settings: _Generation, size: int, seed: int
    ) -> list[str]:
        """Answers to some prompts, padded to `size` rows."""
        tokens, valid = pad_prompts(prompts, size)
        result = generate(
            self.model,
            tokens,
            settings.max_new_tokens,
            key=jax.random.key(seed),
            segment_ids=valid,
            stop_tokens=(self._end, *self.model.config.eos_token_ids),
            stop_strings=tuple(settings.until),
            decode=self.tokenizer.decode,
            use_memory=self.use_memory,
            **settings.sampling,
        )
        new, lengths = np.asarray(result.tokens), np.asarray(result.lengths)
        return [
            postprocess_generated_text(self._text(row[:count]), settings.until, None)
            for row, count in zip(new[: len(prompts)], lengths, strict=False)
        ]

    def _text(self, tokens: np.ndarray) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))
