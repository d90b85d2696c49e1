"""--task harness: any task of lm-eval, against lm-eval's own backend for transformers."""

import functools
import json
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from flax import nnx

from convert import export_pretrained, load_pretrained, load_tokenizer
from experiments.command_line import run_configured
from experiments.evaluate import EvaluateConfig, evaluate
from experiments.evaluation.likelihood import Continuation, padded_length, score_continuations
from experiments.evaluation.variants import FULL, MEMORY
from tests.tiny import write_untrained_run
from tptt_jax import CausalLM, LizaConfig, ModelConfig, generate

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

SENTENCES = [
    "The with statement is used to wrap the execution of a block.",
    "A class definition defines a class object.\nIt is an executable statement.",
    "If the sequence is exhausted, the loop ends.",
]
# Context and continuation: empty, ending with a space, too long, letters of one row, a word again.
PAIRS = [
    ("", "The with statement"),
    ("The with ", "statement is used"),
    (" ".join(SENTENCES), " A class definition"),
    ("Answer:", " A"),
    ("Answer:", " B"),
    ("Answer:", " B B"),
    ("<s>Answer:", " C"),
    ("x", "x"),
]


def write_tasks(folder):
    """Three local tasks of lm-eval, one for each kind of request."""
    questions = [
        {"question": f"{a} + {b}", "choices": [str(a + b), "none", str(a), " of both"], "answer": 0}
        for a, b in ((1, 2), (3, 4), (5, 5), (7, 9), (2, 6))
    ]
    texts = [{"text": sentence} for sentence in SENTENCES]
    tables = {"questions": questions, "texts": texts}
    for name, rows in tables.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines)

    def task(name, table, kind, **settings):
        files = {split: str(folder / f"{table}.jsonl") for split in ("train", "test")}
        shared = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "cache")},
            "output_type": kind,
            "test_split": "test",
            "metadata": {"version": 1},
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(shared | settings))

    def metrics(*names):
        return [{"metric": name} for name in names]

    task(
        "tiny_choice",
        "questions",
        "multiple_choice",
        fewshot_split="train",
        num_fewshot=2,
        doc_to_text="{{question}} =",
        doc_to_choice="{{choices}}",
        doc_to_target="answer",
        metric_list=metrics("acc", "acc_norm"),
    )
    task(
        "tiny_rolling",
        "texts",
        "loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=metrics("word_perplexity", "byte_perplexity", "bits_per_byte"),
    )
    task(
        "tiny_words",
        "texts",
        "generate_until",
        doc_to_text="{{text}}\n",
        doc_to_target="x",
        generation_kwargs={"until": ["e", "\n\n"], "max_gen_toks": 12, "do_sample": False},
        metric_list=metrics("exact_match"),
    )
    return folder


@pytest.fixture(scope="module")
def task_dir(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def backend():
    """lm-eval's own backend for transformers."""
    return pytest.importorskip("lm_eval.models.huggingface").HFLM


def requests(*arguments):
    return [SimpleNamespace(args=each) for each in arguments]


@pytest.fixture(scope="module")
def both(tiny_model_dir, backend):
    """Makes the same model as lm-eval's backend and as ours."""
    from experiments.evaluation.harness_model import HarnessModel

    model, tokenizer = load_pretrained(tiny_model_dir), load_tokenizer(tiny_model_dir)

    def make(max_length=None, batch_size=3):
        theirs = backend(
            str(tiny_model_dir),
            device="cpu",
            dtype="float32",
            max_length=max_length,
            batch_size=batch_size,
        )
        settings = {"use_memory": True, "batch_size": batch_size, "max_length": max_length}
        return theirs, HarnessModel(model, tokenizer, **settings)

    return make


@pytest.mark.parametrize("max_length", [None, 16])
def test_log_likelihoods_are_those_of_lm_eval(max_length, both):
    theirs, ours = both(max_length)
    assert ours.max_length == theirs.max_length
    expected = theirs.loglikelihood(requests(*PAIRS), disable_tqdm=True)
    found = ours.loglikelihood(requests(*PAIRS))
    np.testing.assert_allclose(*([nats for nats, _ in x] for x in (found, expected)), rtol=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_what_greedy_decoding_gives_is_greedy(both):
    _, ours = both()
    prompt = ours.tok_encode("The with statement")
    result = generate(ours.model, np.asarray([prompt] * 3, np.int32), 3)
    tokens = np.asarray(result.tokens)[0].tolist()
    other = [*tokens[:-1], (tokens[-1] + 1) % 500]
    scores = score_continuations(
        ours.model,
        [Continuation(prompt, tokens), Continuation(prompt, other), Continuation(prompt, ())],
        batch_size=2,
        max_length=100,
        use_memory=True,
    )
    assert [each.is_greedy for each in scores] == [True, False, True]
    assert scores[2].nats == 0
    with pytest.raises(
        ValueError, match="a continuation has 3 tokens, more than the maximum length of 2"
    ):
        score_continuations(
            ours.model,
            [Continuation(prompt, tokens)],
            batch_size=1,
            max_length=2,
            use_memory=True,
        )


@pytest.mark.parametrize("max_length", [None, 16])
def test_rolling_log_likelihoods_are_those_of_lm_eval(max_length, both):
    theirs, ours = both(max_length)
    texts = [(text,) for text in (*SENTENCES, " ".join(SENTENCES), "")]
    expected = theirs.loglikelihood_rolling(requests(*texts), disable_tqdm=True)
    np.testing.assert_allclose(ours.loglikelihood_rolling(requests(*texts)), expected, rtol=1e-4)


@pytest.mark.parametrize("max_length", [None, 24])
def test_answers_are_those_of_lm_eval(max_length, both):
    theirs, ours = both(max_length)
    short = {"until": ["t", "zz"], "max_gen_toks": 16}
    plain = {"until": [], "max_new_tokens": 8, "do_sample": False, "temperature": 0.5}
    asked = [(text, short) for text in (*SENTENCES, "x")] + [(text, plain) for text in SENTENCES]
    found = ours.generate_until(requests(*asked))
    assert found == theirs.generate_until(requests(*asked), disable_tqdm=True)
    assert any(found)
    assert not any("t" in text for text in found[:4])


@pytest.mark.slow
def test_real_weights_say_what_they_say_to_lm_eval(smollm_path, tmp_path, backend):
    import torch
    from transformers import AutoModelForCausalLM

    from experiments.evaluation.harness_model import HarnessModel

    model, tokenizer = load_pretrained(smollm_path), load_tokenizer(smollm_path)
    export_pretrained(model, tmp_path / "hf", source=smollm_path)
    torch_model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    theirs = backend(torch_model, tokenizer=tokenizer, batch_size=4)
    ours = HarnessModel(model, tokenizer, use_memory=True, batch_size=4)
    pairs = [("The capital of France is", f" {city}") for city in ("Paris", "Rome")]
    pairs += [("The capital of the USA is", " Washington, D.C."), ("", "Once upon a time")]
    expected = theirs.loglikelihood(requests(*pairs), disable_tqdm=True)
    found = ours.loglikelihood(requests(*pairs))
    np.testing.assert_allclose(*([nats for nats, _ in x] for x in (found, expected)), rtol=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert found[0][1]
    asked = [(prompt, {"until": ["\n"], "max_gen_toks": 6}) for prompt in SENTENCES[:2]]
    assert ours.generate_until(requests(*asked)) == theirs.generate_until(
        requests(*asked), disable_tqdm=True
    )


def test_lengths_are_few():
    lengths = {padded_length(count) for count in range(1, 4097)}
    assert len(lengths) == 13
    assert all(padded_length(x) == x for x in lengths)
    assert all(padded_length(x) < 1.5 * x + 1 for x in range(64, 4096))


@pytest.fixture(scope="module")
def titan(tiny_model_dir, tmp_path_factory):
    return write_untrained_run(tmp_path_factory.mktemp("titan"), tiny_model_dir)


TASKS = ("tiny_choice", "tiny_rolling", "tiny_words")


def test_scores_and_errors_of_columns_are_those_of_lm_eval(
    titan, tiny_model_dir, task_dir, tmp_path, capsys, monkeypatch, backend
):
    from lm_eval.evaluator import evaluate as run_lm_eval
    from lm_eval.tasks import TaskManager

    from experiments.evaluation.harness_model import HarnessModel

    output = tmp_path / "out"
    arguments = ["--models", str(titan), "--task", "harness", "--json"]
    arguments += ["--harness.tasks", *TASKS, "--harness.include-path", str(task_dir)]
    arguments += ["--harness.limit", "4", "--columns", FULL, MEMORY, "--output", str(output)]
    calls = []
    answer = HarnessModel.generate_until

    def interrupted(self, *args, **options):
        calls.append(self.use_memory)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return answer(self, *args, **options)

    monkeypatch.setattr(HarnessModel, "generate_until", interrupted)
    assert run_configured(evaluate, EvaluateConfig, arguments) == 130
    # One column was whole, and of the other two tasks.
    assert len((output / "rows.jsonl").read_text().splitlines()) == 5
    assert run_configured(evaluate, EvaluateConfig, arguments) == 0
    assert calls == [False, True, True]
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    tuned = report["models"][str(titan)]["tasks"]["harness"]
    choice = tuned["scores"]["tiny_choice"]["acc"]
    assert list(choice) == [FULL, MEMORY]
    perplexities = tuned["scores"]["tiny_rolling"]["byte_perplexity"]
    assert len({each["value"] for each in perplexities.values()}) == 2
    assert tuned["tasks"]["tiny_choice"]["questions"] == 4
    assert tuned["tasks"]["tiny_choice"]["num_fewshot"] == 2

    loaded = TaskManager(include_path=task_dir, include_defaults=False).load(list(TASKS))
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=1234)
    theirs = backend(str(tiny_model_dir), device="cpu", dtype="float32")
    expected = run_lm_eval(theirs, loaded, limit=4)["results"]
    # With full attention it is the base model, as its adapters are new.
    for task, metrics in tuned["scores"].items():
        for metric, found in metrics.items():
            value, error = (expected[task][f"{name},none"] for name in (metric, f"{metric}_stderr"))
            assert found[FULL]["value"] == pytest.approx(value, rel=1e-4)
            wanted = None if error == "N/A" else pytest.approx(error, rel=1e-4)
            assert found[FULL]["standard_error"] == wanted
    assert choice[FULL]["standard_error"] is not None
    assert (output / "harness.png").read_bytes().startswith(b"\x89PNG")
    assert "byte_perplexity" in (output / "report.html").read_text()


BAD = [
    ([], "needs --harness.tasks"),
    (["--harness.tasks", "chess"], "lm-eval knows no task chess"),
    (["--harness.tasks", "a", "--harness.include-path", "nowhere"], "no such directory: nowhere"),
    (["--harness.tasks", "a", "--harness.limit", "0"], "harness.limit must be above 0"),
    (["--harness.tasks", "a", "--harness.batch-size", "0"], "batch_size must be at least 1"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_what_lm_eval_cannot_run_is_refused(
    arguments, message, tiny_model_dir, tmp_path, capsys, monkeypatch
):
    import lm_eval.tasks

    # Its own list takes half a minute to read.
    manager = lm_eval.tasks.TaskManager
    monkeypatch.setattr(
        lm_eval.tasks,
        "TaskManager",
        lambda include_path, include_defaults: manager(
            include_path=include_path, include_defaults=False
        ),
    )
    given = ["--task", "harness", "--model", str(tiny_model_dir), *arguments]
    given += ["--output", str(tmp_path / "out")]
    assert run_configured(evaluate, EvaluateConfig, given) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_lm_eval_the_extra_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    given = ["--task", "harness", "--harness.tasks", "arc_easy", "--output", str(tmp_path / "out")]
    assert run_configured(evaluate, EvaluateConfig, given) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install 'tptt-jax[harness]'" in line


def test_generation_that_is_not_supported_is_refused(both):
    _, ours = both()
    with pytest.raises(ValueError, match="generates with beams"):
        ours.generate_until(requests(("a", {"num_beams": 4})))
    with pytest.raises(ValueError, match="generates with penalty_alpha"):
        ours.generate_until(requests(("a", {"penalty_alpha": 0.5})))
    with pytest.raises(ValueError, match=r"5000 new tokens leave no room .* in 4096 tokens"):
        ours.generate_until(requests(("a", {"max_gen_toks": 5000})))


def test_a_changed_task_is_measured_again(tmp_path):
    from experiments.evaluation.harness import Harness
    from experiments.evaluation.harness_tasks import HarnessConfig, load_tasks

    write_tasks(tmp_path)

    def key():
        load_tasks.cache_clear()
        config = HarnessConfig(tasks=("tiny_choice",), include_path=tmp_path)
        (row,) = Harness(config).rows(None)
        return row.about["requests"]

    first = key()
    assert key() == first
    table = tmp_path / "questions.jsonl"
    table.write_text(table.read_text().replace('"answer": 0', '"answer": 1', 1))
    assert key() != first


def test_memory_of_a_titan_counts_in_its_scores():
    @functools.partial(nnx.jit, static_argnames="use_memory")
    def logits_of(model, tokens, *, use_memory):
        return model(tokens, use_memory=use_memory).logits

    config = ModelConfig.tiny(num_layers=1)
    model = CausalLM(config, LizaConfig(softmax_window=4), rngs=nnx.Rngs(0))
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, 40).tolist()
    for use_memory in (True, False):
        (score,) = score_continuations(
            model,
            [Continuation(tokens[:10], tokens[10:])],
            batch_size=4,
            max_length=64,
            use_memory=use_memory,
        )
        logits = logits_of(model, jnp.asarray([tokens]), use_memory=use_memory)[0]
        nats = jax.nn.log_softmax(logits)[jnp.arange(9, 39), jnp.asarray(tokens[10:])]
        assert score.nats == pytest.approx(float(nats.sum()), rel=1e-4)
