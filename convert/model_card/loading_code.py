"""Code that loads an exported model: in transformers, in PEFT, and here."""

from typing import Literal

CardFormat = Literal["merged", "titan", "peft", "tptt"]

_TRANSFORMERS = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}"{options})
tokenizer = AutoTokenizer.from_pretrained("{name}")
```"""
_TRAIN = """```python
from peft import LoraConfig, get_peft_model

lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
model = get_peft_model(model, lora)  # new adapters on top, to train it further
```"""
_PEFT = """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained("{base}"{options})
model = PeftModel.from_pretrained(base, "{name}")
tokenizer = AutoTokenizer.from_pretrained("{base}")
```"""
_TPTT = """```python
from tptt import TpttModel  # tptt==0.12.1

model = TpttModel.from_pretrained("{name}")
```"""
_HERE = """```python
from convert import load_pretrained, load_tokenizer

model = load_pretrained({arguments})
tokenizer = load_tokenizer("{tokenizer}")
```"""


def loading_parts(format: CardFormat, name: str, base: str | None, revision: str | None) -> str:
    """How to load a model, by library.

    Args:
      format: of the export.
      name: that users load: a directory or a hub id.
      base: hub id of the base model of an adapter; None: it has none, and users put theirs.
      revision: of the base model; None: the newest.
    """
    if format == "peft":
        options = "" if revision is None else f', revision="{revision}"'
        known = base or "BASE_MODEL"
        source = known if revision is None else f"{known}@{revision}"
        here = f'"{name}"' if base else f'"BASE_MODEL", adapter="{name}"'
        parts = {
            "transformers and PEFT": _PEFT.format(name=name, base=known, options=options),
            "tptt_jax": _HERE.format(arguments=here, tokenizer=source),
        }
    elif format == "tptt":
        here = _HERE.format(arguments=f'"{name}"', tokenizer=name)
        parts = {"tptt": _TPTT.format(name=name), "tptt_jax": here}
    else:
        options = ", trust_remote_code=True" if format == "titan" else ""
        parts = {
            "transformers": _TRANSFORMERS.format(name=name, options=options),
            "PEFT": _TRAIN,
            "tptt_jax": _HERE.format(arguments=f'"{name}"', tokenizer=name),
        }
    return "\n\n".join(f"In {library}:\n\n{code}" for library, code in parts.items())
