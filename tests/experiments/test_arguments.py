import io
import os
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import yaml

from experiments.command_line import parse_arguments, resolved_yaml, run_configured
from experiments.data import DataConfig
from experiments.data.formats import alpaca_prompt
from experiments.finetune import run_finetune
from experiments.training import FinetuneConfig
from experiments.training.config import FitConfig, OptimizerConfig, ShareConfig
from tptt_jax.config import LizaConfig, LoraConfig
from tptt_jax.training.schedules import MagSchedule


def parse(*argv: str) -> FinetuneConfig:
    return parse_arguments(argv, FinetuneConfig, prog="finetune")


@pytest.fixture
def yaml_file(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return str(path)

    return write


# --- flags -----------------------------------------------------------------------------------


def test_no_arguments_are_the_defaults():
    config = parse()
    assert config == FinetuneConfig()
    assert (config.model, config.data.path, config.train) == ("smollm2-135m", "python-docs", "lora")
    assert config.liza == LizaConfig()
    assert config.fit == FitConfig()
    assert config.lora == LoraConfig(rank=8, alpha=16.0)
    assert config.optimizer.grad_clip == 1.0


@pytest.mark.parametrize(
    ("argv", "is_demo"),
    [
        ([], True),
        (["--json", "--fit-steps=2"], True),
        (["--model=m.gguf"], False),
        (["--data", "d.csv"], False),
        (["--config", "{recipe}"], False),
    ],
    ids=["nothing", "other flags", "model", "data", "config"],
)
def test_what_names_no_model_data_or_configuration_is_the_demo(argv, is_demo, project_dir):
    recipes, configs = project_dir / "experiments/configs", []
    argv = [flag.format(recipe=recipes / "paper.yaml") for flag in argv]
    assert run_finetune(lambda config: configs.append(config), argv) == 0
    (config,) = configs
    assert (config.config == recipes / "demo.yaml") == is_demo
    if is_demo:
        assert config.liza == LizaConfig(softmax_window=32)
        assert (config.data.recall, config.model) == (0.5, "smollm2-135m")


def test_the_flags_of_the_public_face():
    flags = (
        "--model m.gguf --data d.jsonl --steps 7 --output out --liza.operator delta_rule "
        "--liza.softmax-window 512 --lora.rank 4 --data.sequence-length 99 --data.no-packing "
        "--batch-size 3 --lora.targets q_proj v_proj --no-resume"
    )
    config = parse(*flags.split())
    assert config.model == "m.gguf"
    assert config.output == Path("out")
    assert config.data == DataConfig(path="d.jsonl", sequence_length=99, packing=False)
    assert config.liza == LizaConfig(operator="delta_rule", softmax_window=512)
    assert config.lora == LoraConfig(rank=4, targets=("q_proj", "v_proj"))
    assert (config.steps, config.batch_size, config.resume) == (7, 3, False)


@pytest.mark.parametrize("operator", ["delta_rule", "delta_rule_gelu", "gated_delta_product"])
def test_an_operator_brings_its_own_fields(operator):
    assert parse("--liza.operator", operator).liza == LizaConfig(operator=operator)
    three = parse("--liza.operator", operator, "--liza.num-householder", "3").liza
    assert three == LizaConfig(operator=operator, num_householder=3)


def test_precision_of_the_memory_is_a_flag():
    assert parse("--liza.precision", "high").liza == LizaConfig(precision="high")
    assert parse().liza.precision == "auto"


def test_memory_and_adapters_can_be_left_out():
    assert parse().memory == LizaConfig()
    assert parse("--no-liza").memory is None
    window = ("--liza.softmax-window", "5", "--liza.softmax-sinks", "2")
    alone = LizaConfig(writes="none", softmax_window=5, softmax_sinks=2)
    assert parse("--no-liza", *window, "--liza.mag", "learned").memory == alone
    kept = parse("--no-liza", *window, "--liza.full-layers", "13", "4").memory
    assert kept == replace(alone, full_layers=(4, 13))
    assert parse().adapters == LoraConfig()
    assert parse("--train", "projections").adapters is None


def test_help_shows_every_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    flags = re.findall(r"^(?:│ |  )(--[a-z][\w.-]+)", text, flags=re.MULTILINE)
    assert len(flags) > 50
    assert text.count("(default:") == len(flags)
    assert {"--data", "--liza.operator", "--lora.rank", "--config", "--batch-size"} <= set(flags)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--stepz", "3"], "there is no option --stepz: did you mean --steps?"),
        (["extra"], "no option takes these arguments: extra"),
        (["--steps"], "--steps needs a value"),
        (["--steps", "many"], "--steps expects a whole number, got 'many'"),
        (["--steps", "-1"], "steps must be at least 0, got -1"),
        (["--epochs", "0"], "epochs must be above 0"),
        (["--liza.operator", "rwkv"], "--liza.operator expects one of None, delta_product,"),
        (["--liza.mag-init", "2"], "mag_init must lie between 0 and 1, got 2"),
        (["--lora.rank", "0"], "rank must be at least 1, got 0"),
        (["--data.eval-rows", "1.5"], "eval_rows must be a share"),
        (["--mag-schedule", "gradual"], "mag_schedule = .* add --liza.mag scheduled"),
        (["--liza.mag", "scheduled", "--mag-start", "2"], r"a share mu must lie in \[0, 1\]"),
        (["--learning-rate", "-1"], "learning_rate must not be negative"),
        (["--optimizer.learning-rate", "1"], "there is no option .*: did you mean --learning-rate"),
        (["--mag-period", "0"], "a mag schedule needs steps >= 1, period >= 1 and at least one"),
        (["--early-stop", "2"], "--early-stop needs evaluations while training: add --eval-every"),
        (["--fit-steps", "-1"], "fit: steps must be at least 0, got -1"),
        (["--distill-steps", "-2"], "fit: distill_steps must be at least 0, got -2"),
        (["--fit-length", "1"], "fit: length must be at least 2, got 1"),
        (["--fit-batch-size", "0"], "fit: batch_size must be at least 1, got 0"),
        (["--distill-batch-size", "0"], "fit: distill_batch_size must be at least 1, got 0"),
        (["--fit-learning-rate", "0"], "fit: learning_rate must be above 0, got 0"),
        (["--distill-learning-rate", "nan"], "fit: distill_learning_rate must be above 0, got nan"),
        (["--distill", "2"], "distill must lie between 0 and 1, got 2"),
        (["--distill", "1", "--train", "full"], "--distill needs unchanged weights"),
        (["--data.recall", "1"], r"recall must lie in \[0, 1\), got 1"),
        (["--window-range", "4"], "--window-range expects 2 whole numbers, got '4'"),
        (["--window-range", "9", "4"], "--window-range expects 1 <= smallest <= largest, got 9 4"),
        (["--window-range", "2", "4"], "--window-range reaches 4, but --liza.softmax-window is No"),
        (["--config", "a.yaml", "--config=b.yaml"], "--config must be given once"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])  # of the boxes that tyro draws
def test_wrong_flags_are_one_sentence(argv, message, encoding, monkeypatch, capfd):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    with pytest.raises(ValueError, match=f"^{message}.*") as caught:
        parse(*argv)
    shown = str(caught.value)
    assert "\n" not in shown
    assert not set(shown) & set("│╭╰─")
    assert "---" not in shown
    assert "default" not in shown
    assert capfd.readouterr() == ("", "")


# --- YAML ------------------------------------------------------------------------------------


def test_flags_override_yaml_and_yaml_overrides_defaults(yaml_file):
    path = yaml_file(
        "model: other\nsteps: 9\nlearning_rate: 1e-3\nepochs: 2\n"
        "data: {path: d.csv, sequence_length: 128}\n"
        "liza: {writes: all, mag_init: 0.2, softmax: false}\nlora: {targets: [q_proj]}\n"
    )
    config = parse("--config", path, "--steps", "5", "--liza.mag-init", "0.3", "--liza.softmax")
    assert config == FinetuneConfig(
        config=Path(path),
        model="other",
        steps=5,
        epochs=2.0,
        optimizer=OptimizerConfig(learning_rate=1e-3),
        data=DataConfig(path="d.csv", sequence_length=128),
        liza=LizaConfig(writes="all", mag_init=0.3),
        lora=LoraConfig(targets=("q_proj",)),
    )
    assert parse(f"--config={path}").steps == 9


@pytest.mark.parametrize(
    ("text", "remat"),
    [("true", "full"), ("false", "none"), ("dots", "dots"), ("none", "none")],
)
def test_remat_of_older_files_is_understood(yaml_file, text, remat):
    assert parse("--config", yaml_file(f"remat: {text}")).remat == remat
    assert parse("--config", yaml_file(f"remat: {text}"), "--remat", "full").remat == "full"


def test_data_may_be_a_path_alone(yaml_file):
    assert parse("--config", yaml_file("data: d.csv")).data == DataConfig(path="d.csv")


def test_yaml_shows_in_help(yaml_file, capsys):
    with pytest.raises(SystemExit):
        parse("--config", yaml_file("batch_size: 17"), "--help")
    assert "(default: 17)" in capsys.readouterr().out


def test_operator_fields_of_yaml_stay_and_others_follow_the_flag(yaml_file):
    path = yaml_file("liza: {operator: delta_product_r, num_householder: 4}")
    assert parse("--config", path).liza == LizaConfig(operator="delta_product_r", num_householder=4)
    changed = parse("--config", path, "--liza.operator", "gated_delta_rule").liza
    assert changed == LizaConfig(operator="gated_delta_rule", num_householder=4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz: 3", r"there is no option stepz: did you mean steps\?"),
        ("liza: {operatr: x}", r"no option liza\.operatr: did you mean liza\.operator\?"),
        ("steps: many", "steps must be a whole number, got 'many'"),
        ("steps: 2.5", "steps must be a whole number, got 2.5"),
        ("batch_size: true", "batch_size must be a whole number, got True"),
        ("batch_size: null", "batch_size must be a whole number, got None"),
        ("learning_rate: fast", "learning_rate must be a number, got 'fast'"),
        ("lr_schedul: linear", r"no option lr_schedul: did you mean lr_schedule\?"),
        ("optimizer: {learning_rate: 1}", "there is no option optimizer; the options here are mod"),
        ("model: 5", "model must be text, got 5"),
        ("resume: 1", "resume must be true or false, got 1"),
        ("lora: {targets: q_proj}", r"lora\.targets must be a list, got 'q_proj'"),
        ("train: some", "train must be one of lora, projections, full, memory, got 'some'"),
        ("lora: 5", "lora must be a block of names, got 5"),
        ("lora: {rank: 0}", "rank must be at least 1, got 0"),
        ("- 1", "must hold names and values, got list"),
        ("model: [a", "line 2, is not valid YAML"),
        ("config: other.yaml", "there is no option config"),
        ("xyzzy: 1", "no option xyzzy; the options here are model, revision, output, data,"),
    ],
    ids=lambda value: value[:20],
)
def test_wrong_yaml_is_one_sentence(yaml_file, text, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse("--config", yaml_file(text + "\n"))
    assert "\n" not in str(caught.value)


def test_a_pipe_is_no_yaml_file(tmp_path):
    os.mkfifo(tmp_path / "run.yaml")
    with pytest.raises(ValueError, match=r"run\.yaml is a device, a pipe or a socket: write"):
        parse("--config", str(tmp_path / "run.yaml"))


def test_a_missing_yaml_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file: "):
        parse("--config", str(tmp_path / "run.yaml"))


def test_blocks_without_a_prefix_are_flat_in_files():
    """Files of older runs have these names, and resumed runs are compared by them."""
    values = yaml.safe_load(resolved_yaml(FinetuneConfig()))
    assert values.keys().isdisjoint({"optimizer", "share", "checkpoints", "held_out"})
    names = list(values)
    first = names.index("learning_rate")
    assert names[first - 1 : first + 8] == [
        *("accumulate", "learning_rate", "mag_learning_rate", "lr_schedule", "warmup_steps"),
        *("warmup_ratio", "weight_decay", "grad_clip", "mag_schedule"),
    ]
    assert values["mag_values"] == [0.01, 0.5]
    assert (values["checkpoint_every"], values["keep_best"]) == (20, False)


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--liza.operator", "gated_delta_rule", "--liza.num-householder", "3", "--no-liza"],
        ["--data", "d.csv", "--data.no-packing", "--epochs", "0.5", "--learning-rate", "1e-5"],
        ["--liza.mag", "scheduled", "--mag-schedule", "cyclic", "--mag-values", "0", "0.25"],
        ["--fit-steps", "3", "--fit-data", "f.txt", "--distill", "1"],
        ["--liza.softmax-window", "16", "--window-range", "4", "16", "--fit-length", "99"],
        [
            "--liza.no-softmax",
            "--liza.writes=all",
            "--mesh",
            "data=2",
            "--mesh-rules",
            "experts=tensor",
            "embed=none",
            "--sample-prompt",
            "ü: 'yes'\n#no",
            "--train=full",
        ],
    ],
    ids=lambda argv: " ".join(argv[:2]),
)
def test_a_resolved_configuration_gives_itself_again(yaml_file, argv):
    config = parse(*argv)
    path = yaml_file(resolved_yaml(config))
    assert parse("--config", path) == replace(config, config=Path(path))


OTHER_LIZA = LizaConfig(writes="all", operator="delta_rule", num_householder=3, mag_init=0.4)


@dataclass(frozen=True, kw_only=True)
class Other:
    """A command with a required flag and a memory that is not the usual one."""

    prompt: str
    """What to continue."""
    liza: LizaConfig = OTHER_LIZA


def test_other_commands_keep_their_own_defaults():
    config = parse_arguments(["--prompt", "x", "--liza.operator", "delta_product_c"], Other)
    assert config.prompt == "x"
    expected = LizaConfig(writes="all", operator="delta_product_c", num_householder=3, mag_init=0.4)
    assert config.liza == expected
    with pytest.raises(ValueError, match="--prompt"):
        parse_arguments([], Other)


def test_a_command_answers_as_all_commands_do(capsys):
    def command(config: FinetuneConfig) -> dict:
        if config.seed:
            raise ValueError("seed must be 0.")
        return {"steps": config.steps}

    def run(*argv):
        return (
            run_configured(command, FinetuneConfig, argv, prog="finetune"),
            *capsys.readouterr(),
        )

    assert run("--json", "--steps", "3") == (0, '{"steps": 3}\n', "")
    assert run("--seed", "1", "--json") == (2, "", "error: seed must be 0.\n")
    status, out, err = run("--stepz", "3")
    assert (status, out) == (2, "")
    assert err.startswith("error: there is no option --stepz: did you mean --steps? ")
    assert err.count("\n") == 1
    status, out, err = run("--json", "--help")
    assert (status, err) == (0, "")
    assert out.startswith("usage: finetune")
    assert "Also takes --json" in out
    with pytest.raises(ZeroDivisionError):
        run_configured(lambda config: {"bug": 1 / config.seed}, FinetuneConfig, [])


# --- what the fields mean --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({}, 20),
        ({"steps": 7}, 7),
        ({"epochs": 2}, 14),  # 20 rows, 3 at a time, twice
        ({"epochs": 0.01}, 1),
        ({"epochs": 2, "steps": 5}, 5),
        ({"epochs": 2, "steps": 50}, 14),
    ],
    ids=str,
)
def test_the_length_of_a_run(changes, steps):
    assert FinetuneConfig(batch_size=3, **changes).total_steps(20) == steps


def test_learned_shares_move_a_hundred_times_faster_unless_told():
    rates, learned = OptimizerConfig(learning_rate=1e-3), LizaConfig(writes="all")
    assert rates.for_memory(learned).mag_learning_rate == pytest.approx(0.1)
    assert rates.for_memory(LizaConfig()).mag_learning_rate == pytest.approx(1e-3)
    told = OptimizerConfig(mag_learning_rate=0.3, weight_decay=0.1, warmup_steps=9)
    told = told.for_memory(learned)
    assert told.mag_learning_rate == 0.3
    assert (told.weight_decay, told.warmup_steps, told.lr_schedule) == (0.1, 9, "cosine")


def test_the_share_is_scheduled_only_if_it_is_not_learned():
    assert FinetuneConfig().mag is None
    scheduled = LizaConfig(mag="scheduled", mag_init=0.1)
    assert FinetuneConfig(liza=scheduled, no_liza=True).mag is None
    constant = FinetuneConfig(liza=scheduled).mag
    assert constant is not None
    assert float(constant(1000)) == pytest.approx(0.1)
    schedule = ShareConfig(mag_schedule="gradual", mag_steps=10)
    gradual = FinetuneConfig(liza=scheduled, share=schedule).mag
    assert gradual is not None
    assert [float(gradual(step)) for step in (0, 5, 99)] == pytest.approx([0.1, 0.3, 0.5])


def test_the_paper_recipe(project_dir):
    config = parse("--config", str(project_dir / "experiments/configs/paper.yaml"))
    assert config.liza == LizaConfig.paper()
    assert config.mag == MagSchedule(kind="gradual", start=0.01, end=0.5, steps=100)
    data = config.data
    assert (data.path, data.format, data.sequence_length) == ("yahma/alpaca-cleaned", "alpaca", 384)
    assert data.max_rows == 500 + data.eval_rows
    assert (config.batch_size, config.dtype) == (3, "bfloat16")
    assert config.optimizer.learning_rate == 5e-4
    assert config.total_steps(500) == 834
    assert config.lora == LoraConfig(rank=8, alpha=16.0, dropout=0.05)
    assert config.sample_prompt == alpaca_prompt("Give three tips for staying healthy.")


def test_the_window_recipe(project_dir):
    config = parse("--config", str(project_dir / "experiments/configs/window.yaml"))
    window = config.liza.softmax_window
    assert window is not None
    assert config.liza == LizaConfig(softmax_window=window)
    assert config.data.sequence_length > window


def test_every_recipe_names_only_what_exists(project_dir):
    recipes = sorted((project_dir / "experiments/configs").glob("*.yaml"))
    assert len(recipes) >= 3
    for recipe in recipes:
        assert yaml.safe_load(recipe.read_text())
        parse("--config", str(recipe))
