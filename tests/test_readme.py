"""The README's Python runs as it stands."""

import re

import pytest


@pytest.fixture(scope="module")
def blocks(project_dir):
    return re.findall(r"```python\n(.*?)```", (project_dir / "README.md").read_text(), re.DOTALL)


def test_python_blocks_run_one_after_the_other(blocks, smollm_path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert names["logits"].shape[-1] == names["model"].config.vocab_size
    assert (tmp_path / "smollm2-hf" / "model.safetensors").is_file()
    assert names["losses"][-1] < names["losses"][0]
