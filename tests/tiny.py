"""A tiny model with a real tokenizer, as a Hugging Face directory."""

from pathlib import Path
from typing import Any

import jax
import optax
from flax import nnx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from convert import export_pretrained, load_pretrained
from experiments.data import python_docs_text
from tptt_jax import CausalLM, LizaConfig, LoraConfig, ModelConfig
from tptt_jax.training.checkpoint import RunCheckpoints
from tptt_jax.training.description import Description, write_description
from tptt_jax.training.partition import split_trainable
from tptt_jax.training.train_step import init_train_state

PAD, BOS, EOS, TURN = 0, 1, 2, 3
CHATML = (
    "{% for m in messages %}<|turn|>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)


def make_tokenizer(*, begin: bool, template: str | None = None) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<pad>", "<s>", "</s>", "<|turn|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([python_docs_text()[:50_000]], trainer)
    if begin:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", BOS)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


def write_tiny_model(directory: Path) -> Path:
    """A random Llama of 80,000 parameters and its tokenizer."""
    config = ModelConfig.tiny(
        vocab_size=500, bos_token_id=BOS, eos_token_ids=(EOS,), pad_token_id=PAD, max_positions=4096
    )
    export_pretrained(CausalLM(config, rngs=nnx.Rngs(0)), directory)
    make_tokenizer(begin=True, template=CHATML).save_pretrained(directory)
    return directory


def write_untrained_run(folder: Path, source: Path, **memory: Any) -> Path:
    """A run of finetune that has trained nothing: a Titan behind a window of 16, with adapters."""
    liza, lora = LizaConfig(softmax_window=16, softmax_sinks=2, **memory), LoraConfig(rank=2)
    described = Description(source=str(source), liza=liza, lora=lora, train="lora")
    write_description(folder, described)
    model = CausalLM(load_pretrained(source).config, liza, lora, rngs=nnx.Rngs(0))
    _, trainable, share = split_trainable(model, "lora")
    with RunCheckpoints(folder) as checkpoints:
        checkpoints.save(init_train_state(trainable, share, optax.adam(1e-3), jax.random.key(0)))
    return folder
