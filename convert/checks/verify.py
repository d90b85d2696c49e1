"""Checks of a user's own checkpoint: reading, splitting, padding and packing."""

import dataclasses
import functools
import importlib.util
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from convert.adapters import is_adapter
from convert.bases import has_base
from convert.checks.streaming import STREAMING_CHECKS, Runner, relative_error
from convert.errors import ConversionError
from convert.families.titan import FAMILY
from convert.pretrained import export_pretrained, load_pretrained
from convert.progress import track
from convert.sources import Source, find_checkpoint, locate, open_pretrained
from convert.tokenizers import load_tokenizer
from tptt_jax import CausalLM, LizaConfig, warm_up
from tptt_jax.layers.gates import MassGate
from tptt_jax.model import base_model

MIN_TOKENS = 12
# Added to log Z of the evicted tokens: raises shares of about 1 % to about 50 %.
_LOUD = 5.0
_EXPORT_PIECE = 5
# Relative to the largest logit; rounding errors of models of a few hundred million parameters
# stay well below.
TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}

_TEXT = """\
The old lighthouse keeper climbed the stairs every evening at six, counted 212 steps, and lit the
lamp. He wrote the weather into a book: wind from the north-west, 14 knots, a few clouds. On the
third page somebody else had drawn a whale. "Who did this?" he asked, but nobody had visited for
years. When the ship finally came, its captain brought flour, oil and a letter. It said that from
the first of May 1921 the light would turn by itself, and that no keeper would be needed. He read
it twice, folded it, and went up again, because it was nearly six; the steps were still 212.
"""


@dataclass(frozen=True, kw_only=True)
class Check:
    """The result of one check."""

    model: str
    check: str
    error: float | None
    """Largest difference of logits over the largest logit; None if the check was skipped."""
    tolerance: float
    note: str = ""

    @property
    def result(self) -> Literal["PASS", "FAIL", "SKIP"]:
        """NaN fails."""
        if self.error is None:
            return "SKIP"
        return "PASS" if self.error <= self.tolerance else "FAIL"


Step = Callable[[float], Check]
"""A check to run, given its tolerance."""


def verify_pretrained(
    source: Source,
    *,
    num_tokens: int = 40,
    dtype: DTypeLike | Literal["auto"] = "float32",
    tolerance: float | None = None,
) -> tuple[list[Check], str]:
    """Checks the plain model of a checkpoint, and a Titan of it.

    The plain model is compared with transformers where torch is installed, the Titan with its own
    PyTorch export. For both, the whole text must give the logits that segments, single tokens,
    padded and packed rows give. The Titan has the default memory; a run of ours and a "titan"
    export have their own. Its window is cut to a quarter of the text, so that tokens leave it; the
    share of an unfitted memory is raised, so that its errors are visible.

    Args:
      source: what `load_pretrained` takes.
      num_tokens: length of the text.
      dtype: of weights and computation.
      tolerance: of every check, relative to the largest logit; None: by the dtype.

    Returns:
      The checks, and a description of the text.

    Raises:
      ConversionError: if the source cannot be read.
      ValueError: if `num_tokens` or `tolerance` is too small.
    """
    if num_tokens < MIN_TOKENS:
        raise ValueError(f"tokens must be at least {MIN_TOKENS}, got {num_tokens}.")
    if tolerance is not None and not tolerance > 0:
        raise ValueError(f"tolerance must be positive, got {tolerance}.")
    is_run = find_checkpoint(source) is not None
    own = is_run or _is_titan(source)
    titan = load_pretrained(source, None if own else LizaConfig(), dtype=dtype)
    titan = _behind_window(titan, max(num_tokens // 4, 1), is_fitted=own)
    warm_up(titan)
    limit = tolerance or TOLERANCES[jnp.dtype(titan.dtype).name]
    tokens, text = _tokens(source, num_tokens, titan.config.vocab_size)
    plain, full = Runner(base_model(titan), tokens), Runner(titan, tokens)
    name = "this run" if is_run else "Titan"
    steps = [
        functools.partial(_check_transformers, plain, source),
        *_streaming_steps("base", plain),
        *_streaming_steps(name, full, skip=_why_not_streaming(titan.liza)),
    ]
    if titan.liza is not None:
        steps.append(functools.partial(_check_chunk_size, name, full))
        steps.append(functools.partial(_check_export, name, full))
    return [step(limit) for step in track(steps, "Checking")], text


def _behind_window(model: CausalLM, window: int, *, is_fitted: bool) -> CausalLM:
    """A Titan of evicted tokens with a window of at most this width; others unchanged.

    No parameter depends on the window. An unfitted memory gets a larger share, so that its errors
    are visible.
    """
    liza = model.liza
    if liza is None or liza.writes != "evicted":
        return model
    narrow = window if liza.softmax_window is None else min(liza.softmax_window, window)
    model = _with_liza(model, dataclasses.replace(liza, softmax_window=narrow))
    for _, module in nnx.iter_modules(model):
        if isinstance(module, MassGate) and not is_fitted:
            module.bias[...] = module.bias[...] + _LOUD
    return model


def _with_liza(model: CausalLM, liza: LizaConfig) -> CausalLM:
    """The same parameters with another memory configuration."""

    def build() -> CausalLM:
        return CausalLM(model.config, liza, model.lora, dtype=model.dtype, rngs=nnx.Rngs(0))

    return nnx.merge(nnx.graphdef(nnx.eval_shape(build)), nnx.state(model))


def _is_titan(source: Source) -> bool:
    """Whether a source is a "titan" export, not a run."""
    path = locate(source)
    return path.is_dir() and not has_base(path) and open_pretrained(path).family is FAMILY


def _tokens(source: Source, count: int, vocab_size: int) -> tuple[np.ndarray, str]:
    """Two rows of tokens [2, T], and their description."""
    try:
        ids = np.asarray(load_tokenizer(source)(_TEXT)["input_ids"], np.int32)
    except ConversionError:
        ids = np.zeros(0, np.int32)
    if not ids.size or ids.max() >= vocab_size:
        rows = np.random.default_rng(0).integers(0, vocab_size, (2, count), dtype=np.int32)
        return rows, "random tokens, as no tokenizer fits"
    rows = [np.resize(ids[begin:], count) for begin in (0, len(ids) // 2)]
    return np.stack(rows), "a built-in paragraph"


def _why_not_streaming(liza: LizaConfig | None) -> str:
    if liza is not None and liza.operator == "tptt_reference":
        return 'operator "tptt_reference" depends on chunks and reads padding, as its package does'
    return ""


def _streaming_steps(name: str, run: Runner, *, skip: str = "") -> list[Step]:
    def step(check: str, function: Callable[[Runner], float], limit: float) -> Check:
        error = None if skip else function(run)
        return Check(model=name, check=check, error=error, tolerance=limit, note=skip)

    return [functools.partial(step, *check) for check in STREAMING_CHECKS.items()]


def _check_chunk_size(name: str, run: Runner, limit: float) -> Check:
    """The same weights with another chunk size must give the same result."""
    model, liza = run.model, run.model.liza
    assert liza is not None
    check = Check(model=name, check="other chunk size", error=None, tolerance=limit)
    if note := _why_not_streaming(liza):
        return dataclasses.replace(check, note=note)
    if liza.state_activation != "none":
        return dataclasses.replace(check, note="state_activation depends on the chunk size")
    # Not a divisor of the text's length or of the other size.
    changed = dataclasses.replace(liza, chunk_size=5 if liza.chunk_size != 5 else 7)
    other = _with_liza(model, changed)
    error = relative_error(Runner(other, run.tokens).whole, run.whole)
    return dataclasses.replace(check, error=error)


def _check_transformers(run: Runner, source: Source, limit: float) -> Check:
    check = Check(model="base", check="transformers", error=None, tolerance=limit)
    if importlib.util.find_spec("torch") is None:
        return dataclasses.replace(check, note="torch is not installed")
    # This import needs torch.
    from convert.checks.transformers_logits import is_known, transformers_logits

    if not is_known(run.model.config.family):
        return dataclasses.replace(check, note="transformers does not have this family")
    # transformers cannot read a run, an adapter or a Titan.
    path = None if find_checkpoint(source) or _is_titan(source) else locate(source)
    if path is not None and path.is_dir() and not is_adapter(path):
        theirs, note = transformers_logits(path, run.tokens), ""
    else:
        with tempfile.TemporaryDirectory(prefix="tptt-verify-") as directory:
            exported = Path(directory) / "model"
            export_pretrained(run.model, exported, "merged")
            theirs, note = transformers_logits(exported, run.tokens), "on the exported model"
    return dataclasses.replace(check, error=relative_error(run.whole, theirs), note=note)


def _check_export(name: str, run: Runner, limit: float) -> Check:
    """The PyTorch memory must give our result, in one call and with a cache."""
    check = Check(model=name, check="PyTorch export", error=None, tolerance=limit)
    assert run.model.liza is not None
    if run.model.liza.operator == "tptt_reference":
        return dataclasses.replace(check, note="the reference's operator has no such export")
    if importlib.util.find_spec("torch") is None:
        return dataclasses.replace(check, note="torch is not installed")
    from convert.checks.transformers_logits import titan_logits

    with tempfile.TemporaryDirectory(prefix="tptt-verify-") as directory:
        exported = Path(directory) / "model"
        export_pretrained(run.model, exported, "titan")
        results = titan_logits(exported, run.tokens, piece=_EXPORT_PIECE)
    # In half precision torch is more exact, as it computes in float32.
    errors = [relative_error(run.whole, theirs) for theirs in results]
    return dataclasses.replace(check, error=max(errors))
