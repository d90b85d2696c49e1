"""The contribution of each part of a Titan: perplexity with one part at a time switched off."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.markup import escape
from rich.table import Table

from experiments.data import DataConfig
from experiments.evaluation.blocks import Blocks, difference
from experiments.evaluation.perplexity import score_text, scored_tokens
from experiments.evaluation.store import Result
from experiments.evaluation.task import Results, Row, Summary
from experiments.evaluation.variants import MEMORY, Column
from experiments.training.pictures import new_figure, save_figure
from tptt_jax import CausalLM, LizaConfig, warm_up
from tptt_jax.array_typing import Array, Float, Tokens
from tptt_jax.layers.gates import MassGate
from tptt_jax.layers.liza import LizaAttention
from tptt_jax.model import replace_memory
from tptt_jax.training.transfer import LayerView, visit_layers

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedTokenizerFast

AS_IT_IS = "as it is"
PARTS: dict[str, str] = {
    "memory": "the window alone",
    "window": "full softmax attention; a memory of evicted tokens is idle",
    "sinks": "the window does not keep the first tokens",
    "decay": "the memory forgets nothing",
    "horizon": "the memory forgets no faster when it holds more than it was fitted to",
    "gate": "each head's share is constant, its mean",
    "deltas": "queries, keys and values without the memory's own low-rank changes",
}
# Tokens over which a head's mean share is computed, at least.
_GATE_TOKENS = 2048


@dataclasses.dataclass(frozen=True)
class Ablation:
    """Perplexity of a text, once for each part that is switched off."""

    data: DataConfig
    tokens: int
    """Most tokens to score."""
    name: str = "ablate"
    columns: tuple[Column, ...] = (MEMORY,)

    def rows(self, tokenizer: "PreTrainedTokenizerFast") -> list[Row]:
        """The same text, once for each part."""
        tokens = scored_tokens(self.data, tokenizer, self.tokens)
        about = {"data": self.data.path, "tokens": self.tokens}
        return [Row(about | {"off": part}, tokens) for part in (AS_IT_IS, *PARTS)]

    def measure(
        self,
        model: CausalLM,
        tokenizer: "PreTrainedTokenizerFast",
        row: Row,
        *,
        use_memory: bool,
    ) -> Result:
        """Summed nats and counted tokens of every block; empty where the model lacks the part."""
        del tokenizer
        part: str = row.about["off"]
        assert model.liza is not None, "only a Titan has parts"
        _check_evicts(model.liza, row.data)
        # Half of them have left a long window.
        most = max(_GATE_TOKENS, 2 * _visible(model.liza))
        changed = without_part(model, part, row.data[:most])
        if changed is None:
            return {}
        uses = use_memory and part != "memory"
        return score_text(changed, row.data, use_memory=uses)

    def summarize(self, label: str, rows: Sequence[Row], results: Results) -> Summary:
        """Perplexity without each part, and what that costs in nats."""
        table = Table(
            title=escape(f"{label}: perplexity of {self.data.shown} without one part"),
            title_justify="left",
        )
        table.add_column("switched off")
        table.add_column("perplexity", justify="right")
        table.add_column("costs, nats a token", justify="right")
        table.add_column("what is left")
        found = _found(rows, results)
        if AS_IT_IS not in found:
            return Summary(table, {}, f"{label} has no memory: nothing was switched off.")
        whole, report = found[AS_IT_IS], {}
        for part, blocks in found.items():
            value = blocks.perplexity(0, None)
            cost = difference(blocks, whole)
            cell = "" if part == AS_IT_IS else cost.text("+.3f")
            table.add_row(part, value.text(), cell, PARTS.get(part, ""))
            report[part] = {"perplexity": value.value, "cost": cost.value, "error": cost.error}
        return Summary(table, {"without": report})

    def plot(
        self, png: Path, rows: Mapping[str, Sequence[Row]], results: Mapping[str, Results]
    ) -> None:
        """Draws the cost of switching off each part, a panel for each model."""
        figure, axes = new_figure(len(results), height=3.5)
        for axis, (label, columns) in zip(axes, results.items(), strict=True):
            found = _found(rows[label], columns)
            parts = [part for part in found if part != AS_IT_IS]
            costs = [difference(found[part], found[AS_IT_IS]) for part in parts]
            values = [cost.value for cost in costs]
            axis.barh(parts[::-1], values[::-1], xerr=[c.error for c in costs][::-1])
            axis.axvline(0, color="#1a1a1a", linewidth=1)
            axis.set_xlabel("nats a token that it costs to switch this off")
            axis.set_title(label, loc="left", fontsize=10)
        save_figure(figure, png)


def without_part(model: CausalLM, part: str, tokens: np.ndarray) -> CausalLM | None:
    """A model without one part, sharing its arrays; None if it has no such part.

    Args:
      model: a Titan.
      part: a key of `PARTS`, or `AS_IT_IS`.
      tokens: of a text, for the mean share of each head [T].
    """
    liza = model.liza
    assert liza is not None, "only a Titan has parts"
    if part in (AS_IT_IS, "memory"):
        return model
    if part == "gate":
        return _with_constant_share(model, tokens)
    changes = {
        "window": {"softmax_window": None},
        "sinks": {"softmax_sinks": 0},
        "decay": {"alpha_gate": "constant", "horizon": None},
        "horizon": {"horizon": None},
        "deltas": {"memory_rank": 0},
    }[part]
    changed = dataclasses.replace(liza, **changes)
    if changed == liza:
        return None
    model = replace_memory(model, changed)
    warm_up(model)
    return model


def _visible(liza: LizaConfig) -> int:
    """Tokens that softmax attention sees; 0: all."""
    return 0 if liza.softmax_window is None else liza.softmax_window + liza.softmax_sinks


def _check_evicts(liza: LizaConfig, tokens: np.ndarray) -> None:
    """Raises ValueError if a memory of evicted tokens stays empty."""
    if liza.writes == "evicted" and len(tokens) <= _visible(liza):
        raise ValueError(
            f"ablate: the text has {len(tokens)} tokens, and none of them leaves the window of "
            f"{liza.softmax_window}: give a longer text, or more --tokens."
        )


def _with_constant_share(model: CausalLM, tokens: np.ndarray) -> CausalLM | None:
    liza = model.liza
    assert liza is not None
    if liza.mag != "mass" or liza.softmax_window is None:
        return None
    shares = _mean_shares(model, jnp.asarray(tokens)[None])
    values = {
        f"stacks.{number}.self_attn.mag.logit": jax.scipy.special.logit(share)
        for number, share in enumerate(shares)
        if share is not None
    }
    return replace_memory(model, dataclasses.replace(liza, mag="learned"), values)


@nnx.jit
def _mean_shares(model: CausalLM, tokens: Tokens) -> list[Float[Array, "M H"] | None]:
    """Mean shares over queries after the first eviction; one entry for each stack."""

    def visit(attention: LizaAttention, view: LayerView) -> Array:
        assert isinstance(attention.mag, MassGate)
        assert view.windowed.log_mass is not None
        held = view.lost.held
        share = attention.mag(view.made.soft_q, view.windowed.log_mass, held)[..., 0]
        return jnp.sum(share, axis=(0, 1)) / jnp.sum(held > 0)

    return visit_layers(model, tokens, None, visit)


def _found(rows: Sequence[Row], results: Results) -> dict[str, Blocks]:
    """Sums of blocks, by the part that is switched off."""
    pairs = zip(rows, results.get(MEMORY, ()), strict=False)
    return {row.about["off"]: Blocks.of([result]) for row, result in pairs if result}
