"""Writes docs/families.md: every family measured against transformers (`make families`)."""

import dataclasses
import datetime
import json
import math
import os
import sys
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
import transformers
from safetensors.numpy import load_file

from convert import export_pretrained, load_pretrained
from convert.families import FAMILIES
from tests.convert.published import PUBLISHED, check_published, openelm
from tests.convert.tiny_families import CONFIGS
from tests.parity.family_checks import (
    TOKENS,
    adapter_error,
    export_error,
    gradient_errors,
    plain_logits,
    titan_error,
)
from tests.parity.torch_models import as_stored, build, relative_error, torch_logits

_TARGETS = {"gpt2": ["c_attn"]}
_INTRODUCTION = """# Families, measured

Written by `make families` on {date} ({machine}; torch {torch}, transformers {transformers}, peft
{peft}). Do not edit.

- **tensors, parameters**: of the published checkpoint named, all mapped to ours and back, by shape,
  without allocating them.
- OpenELM, which transformers lacks, is compared with what its original code computed; its export
  is read by us.
- **logits, gradients, export, titan, adapter**: largest relative errors, in float32, on a random
  model of awkward sizes (3 layers, 6 heads on 2, rows longer than every window): our logits
  against transformers'; every gradient of the loss; transformers' logits of our "merged" export
  against those of the original; the exported Titan's PyTorch code, memory on, against ours; an
  adapter that PEFT wrote, we read and wrote, and PEFT read again.
- **seconds**: for all of it, most of it compilation.

"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table."""

    family: str
    published: str
    tensors: str
    parameters: str
    logits: str
    gradients: str
    export: str
    titan: str
    adapter: str
    seconds: str


def count_published(name: str) -> tuple[int, int]:
    """Tensors and parameters of a published checkpoint."""
    content = dict(PUBLISHED[name])
    config = transformers.AutoConfig.for_model(**content)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    tensors = as_stored(dict(model.named_parameters()))
    mapped = check_published(content, {key: tuple(x.shape) for key, x in tensors.items()})
    return mapped, sum(x.numel() for x in tensors.values())


def measure_openelm(directory: Path, shared: Path) -> Row:
    """transformers has no OpenELM: its golden files hold what the original code computed."""
    start = time.perf_counter()
    source = shared / "golden" / "openelm_untied"
    golden = load_file(source / "golden.safetensors")
    model = load_pretrained(source)
    got = model(jnp.asarray(golden["input_ids"])).logits
    lines = (shared / "golden" / "openelm_1_1B_params.tsv").read_text().splitlines()
    shapes = {name: tuple(json.loads(shape)) for name, shape in (x.split("\t") for x in lines)}
    export_pretrained(model, directory / "b", source=source)
    again = load_pretrained(directory / "b")(jnp.asarray(golden["input_ids"])).logits
    return Row(
        family="openelm",
        published="OpenELM-1_1B",
        tensors=str(check_published(openelm("1_1B"), shapes)),
        parameters=f"{sum(map(math.prod, shapes.values())) / 1e6:,.0f} M",
        logits=shown(relative_error(got, golden["logits"])),
        gradients="-",
        export=shown(relative_error(again, np.asarray(got))),
        titan=shown(titan_error(source, directory / "titan")),
        adapter="-",
        seconds=f"{time.perf_counter() - start:.0f}",
    )


def shown(error: float) -> str:
    """An error with one digit."""
    return f"{error:.0e}" if error else "0"


def measure(family: str, config: Any, directory: Path) -> Row:
    """Everything there is to say of one family."""
    start = time.perf_counter()
    (published,) = (name for name, each in PUBLISHED.items() if each["model_type"] == family)
    tensors, parameters = count_published(published)
    theirs = build(config)
    theirs.save_pretrained(directory / "a")
    wanted = torch_logits(theirs, TOKENS)
    ours = load_pretrained(directory / "a")
    targets = _TARGETS.get(family, ["q_proj", "k_proj", "v_proj", "o_proj"])
    errors = {
        "logits": relative_error(plain_logits(ours), wanted),
        "gradients": max(gradient_errors(theirs, ours).values()),
        "export": export_error(directory / "a", directory / "b", wanted),
        "titan": titan_error(directory / "a", directory / "titan"),
        "adapter": adapter_error(directory / "a", directory, targets),
    }
    return Row(
        family=family,
        published=published,
        tensors=str(tensors),
        parameters=f"{parameters / 1e6:,.0f} M",
        seconds=f"{time.perf_counter() - start:.0f}",
        **{name: shown(error) for name, error in errors.items()},
    )


def main() -> None:
    """Measures every family and writes the table."""
    project = Path(__file__).resolve().parents[2]
    rows = []
    for family in sorted(FAMILIES):
        with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if family == "openelm":
                row = measure_openelm(Path(directory), project.parent / "shared")
            else:
                row = measure(family, CONFIGS[family], Path(directory))
        rows.append(row)
        print(dataclasses.astuple(row), file=sys.stderr)
    names = [field.name for field in dataclasses.fields(Row)]
    lines = [names, ["---"] * len(names), *map(dataclasses.astuple, rows)]
    text = _INTRODUCTION.format(
        date=datetime.date.today(),
        machine=f"{os.cpu_count()} CPU cores",
        **{name: version(name) for name in ("torch", "transformers", "peft")},
    )
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    (project / "docs" / "families.md").write_text(text + table, encoding="utf-8")


if __name__ == "__main__":
    main()
