"""Entries of the compilation cache that a killed process, or a disk, has damaged."""

import os
import subprocess
import sys
import textwrap

PROGRAM = """
    import sys, warnings
    from pathlib import Path

    import jax
    from experiments.process.compilation_cache import prepare_process

    prepare_process()
    prepare_process()
    warnings.simplefilter("always")
    folder = Path(sys.argv[1]) / "tptt_jax" / "xla"

    def compile_again():
        jax.clear_caches()
        assert jax.jit(lambda x: 3 * x)(2.0) == 6
        return {file.name: file.read_bytes() for file in folder.glob("jit__lambda*-cache")}

    (name, content), = compile_again().items()
    flipped = content[:99] + bytes([content[99] ^ 255]) + content[100:]
    for damaged in (b"", content[:20], flipped):
        (folder / name).write_bytes(damaged)
        compile_again()
        assert compile_again()[name] != damaged, "replaced"
    warnings.warn("of something else")
"""


def test_a_damaged_entry_is_replaced_without_a_word(tmp_path):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("JAX_")}
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), str(tmp_path)],
        env=environment | {"XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("Warning") == 1
    assert "of something else" in run.stderr
