"""The README.md of an exported model: description, loading, measurements."""

import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import yaml

from convert.errors import ConversionError
from tptt_jax import CausalLM, LizaConfig
from tptt_jax.config import memory_layers

_LOAD = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}"{options})
tokenizer = AutoTokenizer.from_pretrained("{name}")
```"""


def write_card(
    directory: Path,
    name: str,
    model: CausalLM,
    format: Literal["merged", "titan"],
    base: str | None,
    tasks: Mapping[str, Any] | None = None,
) -> None:
    """Writes README.md into an exported directory.

    Args:
      directory: the exported directory.
      name: name of the directory that users will load.
      model: the exported model.
      format: "merged" has no memory, "titan" has.
      base: the base model; None: unknown.
      tasks: reports by task, from `read_results`; None: no measurements.
    """
    liza = model.liza if format == "titan" else None
    head = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["tptt_jax", *(["titan", "linear-attention"] if liza is not None else [])],
    }
    if base is not None and _is_hub_id(base):
        # The hub links to a model, not to a revision of it.
        head["base_model"] = base.partition("@")[0]
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {name}",
        _introduction(model, liza, base),
        "## Use",
        _LOAD.format(name=name, options="" if liza is None else ", trust_remote_code=True"),
        *([] if liza is None else ["## Memory", _memory(model, liza)]),
        *([] if not tasks else ["## Measured", *_measured(tasks)]),
        f"Exported by tptt_jax {metadata.version('tptt-jax')}.",
    ]
    (directory / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def read_results(path: Path, label: str) -> dict[str, Any]:
    """Reads the results of `experiments.evaluate` for a model: reports by task.

    Args:
      path: its results.json.
      label: the model's name in --models or --adapter; ignored for a single model.

    Raises:
      ConversionError: if the file is not one of evaluate's, or holds other models.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        models = {key: found["tasks"] for key, found in content["models"].items()}
    except OSError as error:
        raise ConversionError(
            f"cannot read {path} ({error.strerror}): give the results.json of experiments.evaluate."
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConversionError(
            f"{path} is not a results.json of experiments.evaluate: give the file in its --output."
        ) from error
    if len(models) == 1:
        return next(iter(models.values()))
    if label not in models:
        raise ConversionError(
            f"{path} has results of {', '.join(models)}, not of {label}: evaluate that model."
        )
    return models[label]


def _is_hub_id(base: str) -> bool:
    return base.count("/") == 1 and not Path(base).expanduser().exists()


def _introduction(model: CausalLM, liza: LizaConfig | None, base: str | None) -> str:
    # A path means nothing on another machine.
    origin = (
        "a pretrained model"
        if base is None
        else f"`{base if _is_hub_id(base) else Path(base).name}`"
    )
    adapters = "" if model.lora is None else f", with LoRA of rank {model.lora.rank} merged in"
    if liza is None:
        return f"This is {origin}{adapters}, as a plain transformers model."
    return (
        f"This is {origin}{adapters}, with a linear-attention memory beside its softmax attention. "
        "The PyTorch code that runs it is in this directory."
    )


def _memory(model: CausalLM, liza: LizaConfig) -> str:
    count, every = len(memory_layers(model.config, liza)), model.config.num_layers
    rows = {
        "tokens that softmax attention sees": liza.softmax_window or "all",
        "first tokens that stay visible": liza.softmax_sinks,
        "what is written": "tokens that leave the window"
        if liza.writes == "evicted"
        else "every token",
        "operator": f"{liza.operator}, {liza.num_householder} Householder step(s)",
        "share of the memory": liza.mag,
        "layers with a memory": f"{count} of {every}",
    }
    if liza.full_layers:
        # Their cache grows with the text, which whoever serves the model has to know.
        rows["layers that see all tokens"] = ", ".join(map(str, liza.full_layers))
    lines = [f"| {key} | {value} |" for key, value in rows.items()]
    return "\n".join(["| setting | value |", "|---|---|", *lines])


def _measured(tasks: Mapping[str, Any]) -> list[str]:
    found = []
    perplexity = tasks.get("perplexity", {})
    if perplexity.get("perplexity"):
        errors = perplexity.get("standard_error", {})
        lines = ["| | perplexity |", "|---|---|"]
        for column, value in perplexity["perplexity"].items():
            lines.append(f"| {column} | {value:.2f}{_error(errors.get(column), 2)} |")
        found += [f"Perplexity of {perplexity['tokens']:,} tokens:", "\n".join(lines)]
    without = tasks.get("ablate", {}).get("without")
    if without:
        lines = ["| switched off | perplexity | costs, nats a token |", "|---|---|---|"]
        for part, report in without.items():
            cost = f"{report['cost']:+.3f}{_error(report['error'], 3)}"
            whole = part == "as it is"
            lines.append(f"| {part} | {report['perplexity']:.2f} | {'' if whole else cost} |")
        found += ["What each part is worth, one switched off at a time:", "\n".join(lines)]
    return found


def _error(value: float | None, digits: int) -> str:
    # NaN: too few samples for an error.
    return "" if value is None or value != value else f" ± {value:.{digits}f}"
