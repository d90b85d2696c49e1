"""The configuration of a fine-tuning run.

A block marked `OmitArgPrefixes` is flat on the command line and in YAML files: --learning-rate,
`learning_rate: 1e-3`.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from convert.sources import DEFAULT_MODEL
from experiments.data import DataConfig
from experiments.data.config import check_literals
from experiments.models import apply_revision
from experiments.process.distributed import DistributedConfig
from experiments.training.config.checkpoints import CheckpointConfig, HeldOutConfig
from experiments.training.config.fit import FitConfig
from experiments.training.config.hub import HubConfig
from experiments.training.config.optimizer import OptimizerConfig
from experiments.training.config.output_names import DEFAULT_OUTPUT, name_output
from experiments.training.config.share import ShareConfig
from experiments.training.trackers import TrackerName, check_names
from experiments.training.windows import WindowRange
from tptt_jax.config import LizaConfig, LoraConfig, Remat
from tptt_jax.ops.quantization import BaseDtype
from tptt_jax.sharding import make_rules
from tptt_jax.training.partition import TrainMode
from tptt_jax.training.schedules import MagSchedule

DEMO_STEPS = 20


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Gives a pretrained model a memory, fits it to the model, and trains it on text.

    Without --model, --data and --config this runs the demo: SmolLM2 135M with a window of 32
    tokens, on the Python language reference. `make` installs both, so it needs no network.
    """

    config: Path | None = None
    """YAML file whose values are the defaults of this run; flags override it."""
    model: str = DEFAULT_MODEL
    """"smollm2-135m" or "gemma3-270m", which come as packages; a Hugging Face directory, a Hub id,
    a .gguf file, a PEFT directory or a checkpoint; the --lora options must be those that these were
    trained with."""
    revision: str | None = None
    """Branch, tag or commit of a model on the Hub; the same as hub-id@revision."""
    output: Path = DEFAULT_OUTPUT
    """Directory for checkpoints, metrics, report and adapter; by default named after model and
    data, such as runs/smollm2-135m-python-docs. One that holds another run is refused."""
    data: DataConfig = field(default_factory=DataConfig)
    liza: LizaConfig = field(default_factory=LizaConfig)
    no_liza: tyro.conf.FlagCreatePairsOff[bool] = False
    """Leaves the memory out and trains the plain model, with --liza.softmax-window if set."""
    fit: FitConfig = field(default_factory=FitConfig)
    window_range: tuple[int, int] | None = None
    """Smallest and largest softmax window: each step of fitting and training draws one, so that one
    Titan works with several. None: always --liza.softmax-window."""
    full_layers_auto: int = 0
    """How many layers keep full attention: those whose output the window changes most, measured on
    a few rows when a run begins, and written down as --liza.full-layers. 0: only those that
    --liza.full-layers names."""
    horizon_auto: bool = True
    """Set --liza.horizon, unless it is given, to the longest row of fit and training: beyond that
    the memory forgets faster."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    train: TrainMode = "lora"
    """"lora": adapters; "projections": the weights of q, k, v and o; "full": all weights; "memory":
    only the memory's own parameters, which the others train too."""
    distill: float = 0.0
    """Weight in the training loss, 0 to 1, of the divergence from the base model's predictions; the
    rest is the likelihood of the text."""
    steps: int | None = None
    """Training steps; None: by epochs, or 20. With epochs: the maximum. 0: only fit."""
    epochs: float | None = None
    """Passes over the data; None: by steps."""
    batch_size: int = 2
    """Rows at a time, over all devices."""
    accumulate: int = 1
    """Batches whose gradients make one step, weighted by their counted tokens: the step is that of
    batch_size * accumulate rows, in the memory of batch_size rows."""
    optimizer: tyro.conf.OmitArgPrefixes[OptimizerConfig] = field(default_factory=OptimizerConfig)
    share: tyro.conf.OmitArgPrefixes[ShareConfig] = field(default_factory=ShareConfig)
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the base weights and the activations; trained parameters stay float32."""
    base_dtype: BaseDtype | None = None
    """Quantises the base model's matrices, which --train lora and memory leave as they are: "nf4"
    and "int4" take a quarter to a third of bfloat16's memory, "int8" half, and embedding and head
    are int8 in all. "int4" keeps a Q4_1 GGUF file as it is, "int8" a Q8_0. None: they have
    --dtype."""
    remat: Remat = "none"
    """What the backward pass recomputes. "none": only cheap intermediates; "dots": everything but
    products with weights; "full": whole layers: a third slower, a quarter of the memory."""
    non_finite: Literal["stop", "skip"] = "stop"
    """What happens at a training step whose loss, gradient or update is not finite. "stop": the run
    ends with the state before it; "skip": the step is named and left out, and the tenth in
    succession ends the run."""
    strict: tyro.conf.FlagCreatePairsOff[bool] = False
    """Stop at the first row of the data that cannot be read; otherwise such rows are left out,
    counted, and the first ten are named. Rows that --data.streaming reads while training are each
    named in a warning."""
    mesh: str | None = None
    """Devices along each axis, e.g. "data=2,fsdp=2,tensor=2"; "context=4" divides the tokens of
    each row; None: one device, or with --distributed data = all devices."""
    mesh_rules: tuple[str, ...] = ()
    """Where the mesh divides axes of parameters, if not where it does by default: experts=tensor
    gives each device some of the experts, embed=none leaves that axis whole. Axes are embed, heads,
    kv_heads, mlp, vocab and experts."""
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    seed: int = 0
    """Seed of new parameters, dropout, the order of rows and the held-out rows."""
    checkpoints: tyro.conf.OmitArgPrefixes[CheckpointConfig] = field(
        default_factory=CheckpointConfig
    )
    held_out: tyro.conf.OmitArgPrefixes[HeldOutConfig] = field(default_factory=HeldOutConfig)
    trackers: tuple[TrackerName, ...] = ()
    """Services that also get the metrics, besides TensorBoard's files in output: trackio, wandb.
    Each is a package of its own: pip install 'tptt-jax[wandb]'."""
    sample_prompt: str = "The with statement is used to"
    """Prompt to continue before and after training."""
    sample_tokens: int = 32
    """Length of that continuation; 0: none."""
    hub: HubConfig = field(default_factory=HubConfig)
    dry_run: tyro.conf.FlagCreatePairsOff[bool] = False
    """Load everything and compile a step, say what would be trained and how much memory it takes,
    and end; nothing is written."""
    resume: bool = True
    """Resume from the last checkpoint in output; False: start again."""
    resume_allow: tuple[str, ...] = ()
    """Settings that may differ from the resumed run, such as learning_rate, seed or data;
    config.yaml records the step of each change. More --steps need no permission."""

    def __post_init__(self) -> None:
        """Rejects invalid values."""
        check_literals(self)
        apply_revision(self)
        if self.output == DEFAULT_OUTPUT:
            object.__setattr__(self, "output", name_output(self.model, self.data.path))
        minima = {"steps": 0, "batch_size": 1, "accumulate": 1, "full_layers_auto": 0}
        for name, minimum in (minima | {"sample_tokens": 0}).items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise ValueError(f"{name} must be at least {minimum}, got {value}.")
        if self.epochs is not None and not self.epochs > 0:
            raise ValueError(f"epochs must be above 0, got {self.epochs}.")
        if self.data.streaming and (self.epochs is not None or self.steps is None):
            raise ValueError(
                "--data.streaming has no known number of rows, so that passes over the data cannot "
                "be counted: give --steps, and leave out --epochs."
            )
        check_names(self.trackers)
        make_rules(self.mesh_rules)
        if self.base_dtype is not None and self.train in ("projections", "full"):
            raise ValueError(
                f"--train {self.train} changes base weights, which --base-dtype {self.base_dtype} "
                "cannot hold: use --train lora or memory, or leave --base-dtype out."
            )
        if self.asked_batches and (self.memory is None or self.memory.writes == "none"):
            raise ValueError(
                "--data.recall-trains memory needs a memory to train: leave out --no-liza and "
                "--liza.writes none, or use --data.recall-trains all."
            )
        if not 0 <= self.distill <= 1:
            raise ValueError(f"distill must lie between 0 and 1, got {self.distill}.")
        if self.distill and self.train in ("projections", "full"):
            raise ValueError(
                "--distill needs unchanged weights of the base model: use --train lora or memory, "
                f"not {self.train}."
            )
        schedule = self.share.mag_schedule
        if schedule != "constant" and self.liza.mag != "scheduled":
            raise ValueError(
                f"mag_schedule = {schedule!r} needs a scheduled share: add --liza.mag scheduled."
            )
        window = None if self.memory is None else self.memory.softmax_window
        WindowRange.checked(self.window_range, window)
        self._check_full_layers()

    def _check_full_layers(self) -> None:
        if self.full_layers_auto and self.liza.full_layers:
            raise ValueError(
                "--full-layers-auto chooses what --liza.full-layers names: give one of the two."
            )
        if self.full_layers_auto and self.liza.softmax_window is None:
            raise ValueError(
                "--full-layers-auto chooses by what a window loses, but there is none: give "
                "--liza.softmax-window."
            )

    @property
    def memory(self) -> LizaConfig | None:
        """`liza`; with no_liza its window alone, or None."""
        if not self.no_liza:
            return self.liza
        if self.liza.softmax_window is None:
            return None
        names = ("softmax_window", "softmax_sinks", "full_layers")
        kept = {name: getattr(self.liza, name) for name in names}
        return LizaConfig(writes="none", **kept)

    @property
    def adapters(self) -> LoraConfig | None:
        """`lora`, or None if the weights themselves are trained."""
        return self.lora if self.train == "lora" else None

    @property
    def rows_per_step(self) -> int:
        """Rows that one step of training takes."""
        return self.batch_size * self.accumulate

    @property
    def rules(self) -> dict[str, str]:
        """Where the mesh divides axes of parameters: the default rules with `mesh_rules`."""
        return make_rules(self.mesh_rules)

    @property
    def asked_batches(self) -> int:
        """Batches of recall rows that a step reads beside its text, for the memory alone."""
        share = self.data.recall
        if self.data.recall_trains == "all" or not share:
            return 0
        return max(1, round(self.accumulate * share / (1 - share)))

    @property
    def asked_rows_per_step(self) -> int:
        """Recall rows that one step of training takes for the memory alone."""
        return self.batch_size * self.asked_batches

    @property
    def mag(self) -> MagSchedule | None:
        """The schedule of the memory's share; None if it is not scheduled."""
        if self.no_liza or self.liza.mag != "scheduled":
            return None
        return self.share.starting_at(self.liza.mag_init)

    def total_steps(self, num_rows: int) -> int:
        """Steps of the whole run on `num_rows` rows of training data."""
        if self.epochs is None:
            return DEMO_STEPS if self.steps is None else self.steps
        by_epochs = max(1, math.ceil(self.epochs * num_rows / self.rows_per_step))
        return by_epochs if self.steps is None else min(self.steps, by_epochs)
