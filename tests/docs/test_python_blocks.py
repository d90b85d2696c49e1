"""Python blocks of every page run unchanged; blocks of a page share their names.

A block marked "python notest" is not run. A page that goes on from a model of the reader's own is
given a tiny one.
"""

import jax
import pytest
from flax import nnx

from tests.docs.pages import blocks, pages
from tptt_jax import CausalLM, LizaConfig, LoraConfig, ModelConfig


def _given_long_context(tiny_model_dir, folder):
    model = CausalLM(ModelConfig.tiny(), LizaConfig(softmax_window=8), rngs=nnx.Rngs(0))
    tokens = jax.random.randint(jax.random.key(0), (3, 40), 0, model.config.vocab_size)
    return {"model": model, "document": tokens[:1], "more": tokens[1:2, :9], "questions": tokens}


def _given_titan(tiny_model_dir, folder):
    pytest.importorskip("torch", reason="torch is for tests: pip install '.[test]'")
    from convert import export_pretrained, load_pretrained

    model = load_pretrained(tiny_model_dir, LizaConfig(softmax_window=4), LoraConfig(rank=2))
    path = str(folder / "titan")
    export_pretrained(model, path, "titan", source=tiny_model_dir)
    return {"path": path}


def _given_reference(tiny_model_dir, folder):
    pytest.importorskip("torch", reason="torch is for tests: pip install '.[test]'")
    pytest.importorskip("tptt", reason="tptt is for tests: pip install '.[test]'")
    from convert import export_pretrained, load_pretrained

    liza = LizaConfig.tptt_reference()
    model = load_pretrained(tiny_model_dir, liza, LoraConfig(rank=2))
    export_pretrained(model, folder / "titan_dir", "tptt", source=tiny_model_dir)
    return {"load_pretrained": load_pretrained, "export_pretrained": export_pretrained}


def _given_family(tiny_model_dir, folder):
    import convert.families.mistral

    # The page shows this file without its imports.
    return {k: v for k, v in vars(convert.families.mistral).items() if k != "FAMILY"}


GIVEN = {
    "docs/adding-a-family.md": _given_family,
    "docs/long-context.md": _given_long_context,
    "docs/titan-export.md": _given_titan,
    "docs/reference-operator.md": _given_reference,
}
SMOLLM = ("README.md", "docs/guides/convert.md")
UNTESTED = {}
RUN = [page for page in pages() if any(block.language == "python" for block in blocks(page))]


@pytest.mark.parametrize("page", RUN)
def test_python_blocks_run_one_after_the_other(
    page, request, tmp_path, tiny_model_dir, monkeypatch
):
    if page in SMOLLM:
        request.getfixturevalue("smollm_path")
    monkeypatch.chdir(tmp_path)
    names = GIVEN[page](tiny_model_dir, tmp_path) if page in GIVEN else {}
    if page == "docs/titan-export.md":
        patched = "transformers.dynamic_module_utils.HF_MODULES_CACHE"
        monkeypatch.setattr(patched, str(tmp_path / "modules"))
    for block in blocks(page):
        if block.language == "python":
            # Lines of a traceback are those of the page.
            exec(compile("\n" * (block.line - 1) + block.text, page, "exec"), names)
    if page == "README.md":
        assert (tmp_path / "smollm2-hf" / "model.safetensors").is_file()
    if "losses" in names:
        assert names["losses"][-1] < names["losses"][0]


def test_few_blocks_are_not_run():
    skipped = {
        page: count
        for page in pages()
        if (count := sum(block.language == "python notest" for block in blocks(page)))
    }
    assert skipped == UNTESTED


def test_pages_with_names_of_their_own_exist():
    assert {*GIVEN, *SMOLLM} <= set(RUN)
