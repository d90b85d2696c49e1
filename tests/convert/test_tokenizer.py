import json
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from convert import ConversionError, load_tokenizer
from convert.families import FAMILIES
from convert.tokenizers import export_tokenizer
from tptt_jax.training.description import Description, write_description

FRANCE = [2, 818, 5279, 529, 7001, 563]
SPACES = "  two  spaces, three   spaces,\n\n\nnewlines\t\ttabs  \n and \u00e9\u4e2d\U0001f600 \n"


@pytest.fixture(scope="module")
def demo(demo_model_path: Path) -> PreTrainedTokenizerFast:
    return load_tokenizer("demo")


@pytest.fixture(scope="module")
def hf_directory(tmp_path_factory) -> Path:
    """A byte-level tokenizer as transformers saves it."""
    path = tmp_path_factory.mktemp("hf")
    backend = Tokenizer(models.BPE(vocab={chr(i): i - 33 for i in range(33, 127)}, merges=[]))
    # As Qwen's class has it, which would otherwise give other ids than the file.
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<end>", extra_special_tokens=["<extra>"]
    )
    tokenizer.chat_template = "{{ messages[0].content }}!"
    tokenizer.save_pretrained(path)
    return path


def test_demo_gives_the_known_tokens(demo):
    assert demo("The capital of France is").input_ids == FRANCE
    assert demo("The capital of France is", add_special_tokens=False).input_ids == FRANCE[1:]
    assert (demo.bos_token_id, demo.eos_token_id, demo.pad_token_id) == (2, 1, 0)
    assert (demo.bos_token, demo.eos_token, demo.pad_token) == ("<bos>", "<eos>", "<pad>")
    assert demo.unk_token == "<unk>"
    assert len(demo) == 262144


def test_demo_decodes_what_it_encodes(demo):
    ids = demo(SPACES).input_ids
    assert demo.decode(ids, skip_special_tokens=True) == SPACES
    assert demo.decode(ids) == "<bos>" + SPACES


def test_demo_keeps_control_tokens_whole(demo):
    ids = demo("<start_of_turn>user\n", add_special_tokens=False).input_ids
    assert demo.convert_ids_to_tokens(ids) == ["<start_of_turn>", "user", "\n"]


def test_a_batch_is_padded(demo):
    batch = demo(["The capital of France is", "a"], padding=True)
    assert batch.attention_mask == [[1] * 6, [1, 1, 0, 0, 0, 0]] or batch.attention_mask == [
        [1] * 6,
        [0, 0, 0, 0, 1, 1],
    ]
    assert 0 in batch.input_ids[1]


def test_exported_demo_tokenizer_loads_in_transformers(demo, demo_model_path, tmp_path):
    export_tokenizer("demo", tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gemma3_text"}')
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("The capital of France is").input_ids == FRANCE
    assert theirs(SPACES).input_ids == demo(SPACES).input_ids
    assert theirs.decode(theirs(SPACES).input_ids, skip_special_tokens=True) == SPACES
    assert theirs.special_tokens_map == demo.special_tokens_map


def write_gguf(path: Path, **settings) -> Path:
    """A byte-level vocabulary with one merge, as llama.cpp stores it."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(settings.get("pre", "default"))
    tokens = [*(chr(i) for i in range(33, 127)), "\u0120", "ab", "<s>", "</s>"]
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 2) + [3, 3])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(len(tokens) - 2)
    writer.add_eos_token_id(len(tokens) - 1)
    if "add_bos" in settings:
        writer.add_add_bos_token(settings["add_bos"])
    if "template" in settings:
        writer.add_chat_template(settings["template"])
    writer.add_tensor("x", __import__("numpy").zeros(1, "f4"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_file_and_its_cache_agree(tmp_path, monkeypatch):
    """A file in the cache's folder is read once; later its tokenizer comes from files beside it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "tptt_jax").mkdir()
    path = write_gguf(tmp_path / "tptt_jax" / "a.gguf", add_bos=True, template="[{{ messages }}]")
    built = load_tokenizer(path)
    assert list(path.parent.glob("a.tokenizer-*/tokenizer.json"))
    monkeypatch.setattr("convert.tokenizers.loading._from_gguf", None)
    cached = load_tokenizer(path)
    for text in ("ab", "b a</s>ab", SPACES):
        assert built(text).input_ids == cached(text).input_ids
        assert cached.decode(cached(text).input_ids) == built.decode(built(text).input_ids)
    assert built.special_tokens_map == cached.special_tokens_map
    assert built.chat_template == cached.chat_template


@pytest.mark.parametrize(
    ("settings", "begins"),
    [({}, False), ({"add_bos": True}, True), ({"pre": "llama-bpe"}, True)],
    ids=["silent file", "file says so", "Llama 3"],
)
def test_begin_of_text(tmp_path, settings, begins):
    tokenizer = load_tokenizer(write_gguf(tmp_path / "a.gguf", **settings))
    text = tokenizer("ab").input_ids
    assert tokenizer.convert_ids_to_tokens(text) == ["<s>"] * begins + ["ab"]
    assert tokenizer.pad_token is None


def test_chat_template_of_a_gguf(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", template="[{{ messages[0]['content'] }}]</s>")
    messages = [{"role": "user", "content": "a b"}]
    for tokenizer in (load_tokenizer(path), exported(path, tmp_path / "out")):
        assert tokenizer.apply_chat_template(messages, tokenize=False) == "[a b]</s>"


def exported(source, directory) -> PreTrainedTokenizerFast:
    directory.mkdir()
    export_tokenizer(source, directory)
    return load_tokenizer(directory)


def test_a_gguf_without_a_tokenizer(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ConversionError, match="no tokenizer that can be read"):
        load_tokenizer(tmp_path / "a.gguf")


def test_hugging_face_directory(hf_directory):
    tokenizer = load_tokenizer(hf_directory)
    assert tokenizer.decode(tokenizer("abc").input_ids) == "abc"
    assert tokenizer.eos_token == "<end>"


@pytest.mark.parametrize("model_type", [*FAMILIES, "another"])
def test_the_class_is_the_one_transformers_takes(hf_directory, tmp_path, model_type):
    path = tmp_path / "model"
    shutil.copytree(hf_directory, path)
    (path / "config.json").write_text(json.dumps({"model_type": model_type}))
    settings = json.loads((path / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "TokenizersBackend"
    for name in ("TokenizersBackend", "PreTrainedTokenizerFast"):
        settings["tokenizer_class"] = name
        (path / "tokenizer_config.json").write_text(json.dumps(settings))
        ours, theirs = load_tokenizer(path), AutoTokenizer.from_pretrained(path)
        assert type(ours) is type(theirs)
        assert ours("abc ab").input_ids == theirs("abc ab").input_ids


def test_a_generic_tokenizer_needs_no_torch(hf_directory, tmp_path):
    path = tmp_path / "model"
    shutil.copytree(hf_directory, path)
    (path / "config.json").write_text(json.dumps({"model_type": "gemma3_text"}))
    program = (
        "import sys; from convert import load_tokenizer; load_tokenizer(sys.argv[1]);"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program, str(path)], check=True, timeout=120)


def test_export_copies_every_tokenizer_file(hf_directory, tmp_path):
    tokenizer = exported(hf_directory, tmp_path / "out")
    for file in hf_directory.iterdir():
        if file.name != "tokenizer_config.json":
            assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    messages = [{"role": "user", "content": "hello"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "hello!"


def test_transformers_4_knows_the_names_in_an_export(hf_directory, tmp_path):
    tokenizer = exported(hf_directory, tmp_path / "out")
    source, settings = (
        json.loads((path / "tokenizer_config.json").read_text())
        for path in (hf_directory, tmp_path / "out")
    )
    # transformers 4.57.3 refuses the class and fails on the list.
    assert source.pop("tokenizer_class") == "TokenizersBackend"
    assert settings.pop("tokenizer_class") == "PreTrainedTokenizerFast"
    assert settings.pop("additional_special_tokens") == source.pop("extra_special_tokens")
    assert settings == source
    assert tokenizer.extra_special_tokens == ["<extra>"]
    assert "<extra>" in tokenizer.all_special_tokens


def test_an_export_keeps_special_tokens_of_both_names(hf_directory, tmp_path):
    path = hf_directory / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"additional_special_tokens": ["<tool>", "<extra>"]}
    path.write_text(json.dumps(settings | {"extra_special_tokens": ["<extra>", "hello"]}))
    exported(hf_directory, tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["additional_special_tokens"] == ["<tool>", "<extra>", "hello"]
    assert "extra_special_tokens" not in settings


def test_a_hub_id_fetches_no_weights(hf_directory, monkeypatch):
    patterns: list[str] = []

    def snapshot(name, allow_patterns):
        patterns.extend(allow_patterns)
        return str(hf_directory)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert load_tokenizer("someone/some-model").eos_token == "<end>"
    assert patterns
    assert not any("safetensors" in pattern for pattern in patterns)


def test_a_checkpoint_has_the_tokenizer_of_its_source(hf_directory, tmp_path):
    description = Description(source=str(hf_directory), liza=None, lora=None, train="lora")
    write_description(tmp_path / "run", description)
    assert load_tokenizer(tmp_path / "run").eos_token == "<end>"
    assert exported(tmp_path / "run", tmp_path / "out").eos_token == "<end>"


@pytest.mark.parametrize("damage", ["empty", "bad json", "only a config"])
def test_directories_without_a_tokenizer(hf_directory, tmp_path, damage):
    path = tmp_path / "d"
    path.mkdir()
    if damage == "bad json":
        shutil.copytree(hf_directory, path, dirs_exist_ok=True)
        (path / "tokenizer_config.json").write_text("{")
    if damage == "only a config":
        (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ConversionError, match="no tokenizer that can be read"):
        load_tokenizer(path)
