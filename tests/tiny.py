"""A tiny model with a real tokenizer, as a Hugging Face directory."""

from pathlib import Path

from flax import nnx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from convert import export_pretrained
from experiments.data import python_docs_text
from tptt_jax import CausalLM, ModelConfig

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
