"""Writes a model card, and gives it another name."""

from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from convert.model_card.licenses import BaseFacts, read_base_facts, split_card
from convert.model_card.loading_code import CardFormat, loading_parts
from convert.model_card.markdown import render_rows
from convert.model_card.results import Results, render_results
from convert.model_card.run_summary import measured_parts, recipe_parts, summary_of
from convert.sources import PACKAGED_HUB_IDS, locate, parse_hub_name
from tptt_jax import CausalLM, LizaConfig
from tptt_jax.config import memory_layers

_CARD = "README.md"
_TAGS = {
    "merged": [],
    "titan": ["titan", "linear-attention"],
    "peft": ["lora"],
    "tptt": ["tptt", "linear-attention", "lora"],
}


class Origin(NamedTuple):
    """The base model of an export.

    Attributes:
      name: for readers, without folders; None: unknown.
      hub_id: on the hub; None: it is not there, or unknown.
      revision: of `hub_id`; None: the newest.
      facts: its licence and its own origin.
    """

    name: str | None = None
    hub_id: str | None = None
    revision: str | None = None
    facts: BaseFacts = BaseFacts({})


def find_origin(base: str | None, path: Path | None = None) -> Origin:
    """Looks up a base model's name, hub id and licence.

    Args:
      base: as `load_pretrained` takes it; None: unknown.
      path: where its files are; None: `locate` finds them.

    Raises:
      ConversionError: if there is no such model.
    """
    if base is None:
        return Origin()
    facts = read_base_facts(locate(base, weights=False) if path is None else path)
    if base in PACKAGED_HUB_IDS:
        return Origin(base, PACKAGED_HUB_IDS[base], None, facts)
    hub = None if Path(base).expanduser().exists() else parse_hub_name(base)
    if hub is None:
        return Origin(Path(base).name, None, None, facts)
    return Origin(base, hub.name if "/" in hub.name else None, hub.revision, facts)


def write_card(
    directory: Path,
    name: str,
    model: CausalLM,
    format: CardFormat,
    origin: Origin,
    results: Results | None = None,
    run: Path | None = None,
) -> None:
    """Writes README.md into an exported directory.

    Args:
      directory: the exported directory.
      name: name of the directory that users will load.
      model: the exported model.
      format: of the export; "merged" and "peft" have no memory.
      origin: the base model, from `find_origin`.
      results: of `experiments.evaluate`; None: none beside those of the run.
      run: directory of the run that trained the model; None: no run did.
    """
    liza = model.liza if format in ("titan", "tptt") else None
    parts = [
        f"# {name}",
        _introduction(model, liza, format, origin),
        "## Use",
        loading_parts(format, name, origin.hub_id, origin.revision),
        *([] if liza is None else ["## Memory", _memory(model, liza)]),
    ]
    measured = [] if results is None else render_results(results)
    datasets: list[str] = []
    if run is not None:
        step, summary = summary_of(run)
        if liza is None and model.liza is not None:
            parts.append(
                "The run trained a window or a memory too, which this format leaves out: "
                "measurements with them are those of the run, not of these weights alone."
            )
        if summary is None:
            parts += ["## Training", f"Weights after step {step} of a run that has not finished."]
        else:
            parts += ["## Training", *recipe_parts(summary, step)]
            measured = measured_parts(summary, run, step) + measured
            datasets = summary.datasets
    if measured:
        parts += ["## Measured", *measured]
    parts += ["## Licence", _licence(origin)]
    parts.append(f"Exported by tptt_jax {metadata.version('tptt-jax')}.")
    head = _front_matter(name, format, origin)
    if "base_model" in head and (run is not None or model.lora is not None):
        head["base_model_relation"] = "adapter" if format in ("peft", "tptt") else "finetune"
    if datasets:
        head["datasets"] = datasets
    (directory / _CARD).write_text(_joined(head, "\n\n".join(parts) + "\n"), encoding="utf-8")


def rename_card(text: str, name: str) -> str:
    """A card with another name in its title and its code, as a model has once it is pushed.

    Args:
      text: a card of ours; other texts stay as they are.
      name: e.g. a hub id.
    """
    head, body = split_card(text)
    old = head.get("model_name")
    if not isinstance(old, str) or not old:
        return text
    body = body.replace(f'"{old}"', f'"{name}"').replace(f"# {old}\n", f"# {name}\n", 1)
    return _joined(head | {"model_name": name}, body.lstrip("\n"))


def _joined(head: dict[str, Any], body: str) -> str:
    text = yaml.safe_dump(head, sort_keys=False, allow_unicode=True)
    return f"---\n{text}---\n\n{body}"


def _front_matter(name: str, format: CardFormat, origin: Origin) -> dict[str, Any]:
    head: dict[str, Any] = {"model_name": name}
    head["library_name"] = "peft" if format == "peft" else "transformers"
    head["pipeline_tag"] = "text-generation"
    head["tags"] = ["tptt_jax", *_TAGS[format]]
    # The hub links to a model, not to a revision of it.
    bases = list(origin.facts.base_model) if origin.hub_id is None else [origin.hub_id]
    if bases:
        head["base_model"] = bases[0] if len(bases) == 1 else bases
    return head | origin.facts.license


def _introduction(
    model: CausalLM, liza: LizaConfig | None, format: CardFormat, origin: Origin
) -> str:
    base = "a pretrained model" if origin.name is None else f"`{origin.name}`"
    if format in ("peft", "tptt"):
        rank = "" if model.lora is None else f"LoRA of rank {model.lora.rank}"
        kind = f"{rank} for" if rank else "Weights that differ from those of"
        beside = "" if liza is None else ", with a linear-attention memory beside its attention"
        return f"{kind} {base}{beside}. The base model itself is not in this directory."
    adapters = "" if model.lora is None else f", with LoRA of rank {model.lora.rank} merged in"
    if liza is None:
        return f"This is {base}{adapters}, as a plain transformers model."
    return (
        f"This is {base}{adapters}, with a linear-attention memory beside its softmax attention. "
        "The PyTorch code that runs it is in this directory."
    )


def _memory(model: CausalLM, liza: LizaConfig) -> str:
    count, every = len(memory_layers(model.config, liza)), model.config.num_layers
    written = "tokens that leave the window" if liza.writes == "evicted" else "every token"
    rows = {
        "tokens that softmax attention sees": liza.softmax_window or "all",
        "first tokens that stay visible": liza.softmax_sinks,
        "what is written": "nothing" if liza.writes == "none" else written,
        "operator": f"{liza.operator}, {liza.num_householder} Householder step(s)",
        "share of the memory": liza.mag,
        "layers with a memory": f"{count} of {every}",
    }
    if liza.horizon is not None:
        rows["tokens beyond which it forgets faster"] = f"{liza.horizon:,}"
    if liza.full_layers:
        # Their cache grows with the text, which whoever serves the model has to know.
        rows["layers that see all tokens"] = ", ".join(map(str, liza.full_layers))
    return render_rows(("setting", "value"), list(rows.items()))


def _licence(origin: Origin) -> str:
    known = origin.facts.license
    if not known:
        return (
            "The licence of the base model is unknown: its files name none that was recognised. "
            "Look it up before you use these weights or pass them on."
        )
    name = known.get("license_name") or known["license"]
    link = f" ({known['license_link']})" if "license_link" in known else ""
    return f"The base model's: `{name}`{link}."
