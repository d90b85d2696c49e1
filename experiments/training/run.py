"""A fine-tuning run: its shared parts, and its stages in order."""

import contextlib
import dataclasses
import functools
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from convert import load_pretrained, load_tokenizer
from convert.sources import find_checkpoint
from experiments.data import StreamData, TokenBatchSource, TokenData
from experiments.data.prompts import text_tokens
from experiments.training.best import BEST, BestState, has_stopped_early, records_until
from experiments.training.checks import check_output, describe_run, make_run_mesh
from experiments.training.config import FinetuneConfig
from experiments.training.evaluation import HeldOut, evaluate_held_out
from experiments.training.fit_rows import fit_rows
from experiments.training.fitting import Fitting
from experiments.training.full_layers import with_chosen_layers
from experiments.training.metrics import StepRecord
from experiments.training.placement import Placement
from experiments.training.questions import Questions
from experiments.training.resume import Resumption
from experiments.training.run_data import (
    TrainingBatches,
    check_rows,
    load_run_data,
    print_bad_rows,
)
from experiments.training.stage import STAGES, Stage
from experiments.training.telemetry import Telemetry, begin_of
from experiments.training.trackers import Trackers
from experiments.training.windows import WindowRange
from tptt_jax import CausalLM, generate, warm_up
from tptt_jax.config import runs_memory
from tptt_jax.processes import failing_together, is_first_process
from tptt_jax.training.checkpoint import remove_checkpoints
from tptt_jax.training.description import Description, write_description
from tptt_jax.training.optimizer import make_optimizer
from tptt_jax.training.partition import Partition, load_trainable, split_trainable
from tptt_jax.training.train_step import (
    Batch,
    StepMetrics,
    TrainState,
    TrainStep,
    init_train_state,
    make_train_step,
)

if TYPE_CHECKING:
    from jax.sharding import Mesh
    from transformers import PreTrainedTokenizerFast

# Samples are not greedy: small models would repeat themselves.
_TEMPERATURE = 0.7
_TOP_P = 0.9
# Tokens of a row that is measured whole where a mesh divides rows.
_WHOLE_ROW = 4096
_IDLE = (
    "the memory is idle: without a window nothing is ever evicted; give --liza.softmax-window, or "
    "--no-liza to leave it out"
)


@dataclass(kw_only=True)
class Run:
    """A fine-tuning run; `model` is the result of its latest stage."""

    config: FinetuneConfig
    console: Console
    tokenizer: "PreTrainedTokenizerFast"
    data: TokenData | StreamData
    fit_rows: TokenBatchSource | None
    """Rows to fit the memory on; None: no fit."""
    model: CausalLM
    mesh: "Mesh | None"
    resumption: Resumption
    trackers: Trackers = field(default_factory=Trackers)
    samples: dict[str, str] = field(default_factory=dict)
    """What `show_sample` has printed, by when."""

    @classmethod
    def prepare(cls, config: FinetuneConfig, console: Console) -> "Run":
        """Loads everything, and claims the output directory once all of it is right.

        A dry run claims nothing.
        """
        with failing_together():
            mesh = make_run_mesh(config)
        # The choice is computed by all processes.
        config = with_chosen_layers(config, mesh, console)
        with failing_together():
            description = describe_run(config)
            check_output(config, description)
            resumption = Resumption(config)
            tokenizer = load_tokenizer(config.model)
            data = _load_data(config, tokenizer, resumption, console)
        model = _load_model(config, mesh, console)
        with failing_together():
            check_rows(data, model.config, tokenizer)
            rows = fit_rows(
                *(config, model, tokenizer, resumption.record.seed, console),
                resumption.fit_files or resumption.files,
            )
        resumption.hash_base(model)
        run = cls(
            config=config,
            console=console,
            tokenizer=tokenizer,
            data=data,
            fit_rows=rows,
            model=model,
            mesh=mesh,
            resumption=resumption,
        )
        with failing_together():
            resumption.check_loaded(data, rows)
            if not config.dry_run and is_first_process():
                run._claim_output(description)
        return run

    def _claim_output(self, description: Description) -> None:
        output = self.config.output
        if self.was_complete:
            done = f"{self.resumption.step}; --steps {self.steps}"
            early = self._stopped_early and self.resumption.step != self.steps
            why = f"stopped early ({done})" if early else f"has done all its steps ({done})"
            self.console.print(
                f"the run in {output} {why}: nothing is trained; raise "
                f"{'--early-stop' if early else '--steps'} to continue",
                markup=False,
            )
            return
        if not self.config.resume:
            for folder in (*STAGES, BEST):
                remove_checkpoints(output / folder)
        if not self.config.resume or self.resumption.remeasures:
            (output / "evaluation.json").unlink(missing_ok=True)
        write_description(output, description)
        self.resumption.write()

    @property
    def was_complete(self) -> bool:
        """Whether earlier calls have done all steps, or have stopped early."""
        done = self.resumption.step
        return done is not None and (done >= self.steps or self._stopped_early)

    @functools.cached_property
    def _stopped_early(self) -> bool:
        """Whether earlier calls have stopped early; metrics.jsonl is read once."""
        records = records_until(self.config.output, self.resumption.step)
        return has_stopped_early(records, self.config.early_stop)

    @property
    def window(self) -> int | None:
        """Tokens that softmax attention sees; None: all, or no softmax attention."""
        liza = self.model.liza
        return liza.softmax_window if liza is not None and liza.softmax else None

    @property
    def has_memory(self) -> bool:
        """Whether the model has a memory that can be switched off."""
        liza = self.model.liza
        return liza is not None and liza.softmax and runs_memory(self.model.config, liza)

    @property
    def is_training(self) -> bool:
        """Whether an earlier call began training, after fitting."""
        return Stage.is_started_in(self.config.output)

    def fit(self) -> float:
        """Fits the memory to the base model; returns the seconds spent in steps."""
        fitting = self._fitting()
        seconds, trainable = 0.0, fitting.initial
        transfer, distillation = fitting.transfer(), fitting.distillation()
        if not distillation.is_started:
            first = self.placement.place(fitting.start_transfer())
            state, seconds, _ = transfer.run(first, self.console)
            trainable = state.trainable
        if fitting.distill_steps:
            first = self.placement.place(fitting.start_distillation(trainable))
            state, more, _ = distillation.run(first, self.console)
            seconds, trainable = seconds + more, state.trainable
        load_trainable(self.model, trainable, None)
        return seconds

    def train(self) -> tuple[TrainState, float, int]:
        """Trains on text.

        Returns:
          The last state, the seconds spent in steps, and the number of steps of earlier calls.
        """
        partition, first, compiled = self.training_parts()
        count = sum(value.size for value in first.trainable.values())
        self.console.print(
            f"training {count:,} parameters ({self.config.train}) for {self.steps} steps"
        )

        def step(state: TrainState, batch: Batch, window: Any) -> tuple[TrainState, StepMetrics]:
            return compiled(state, partition.frozen, batch, window)

        def finish(state: TrainState, record: StepRecord) -> StepRecord:
            if self._is_evaluated(record.step):
                held_out = self.held_out(
                    partition.merge(state.trainable, state.share, partition.frozen)
                )
                loss = None if held_out is None else held_out.loss
                record = dataclasses.replace(record, eval_loss=loss)
            best.add(state, record)
            return self._with_memory(partition, state, record, is_last=record.step == self.steps)

        best = BestState(self.config, describe_run(self.config), self.resumption.step or 0)
        batches = self.batches
        stage = Stage(
            title="step",
            rate=("--learning-rate", "learning_rate", self.config.learning_rate),
            folder=self.config.output,
            steps=self.steps,
            checkpoint_every=self.config.checkpoint_every,
            keep_last=self.config.keep_last,
            step=step,
            batch_at=batches.batch_at,
            rows_at=batches.rows_at,
            to_record=functools.partial(_record, self.config.optimizer.schedule(self.steps)),
            finish_record=finish,
            is_over=best.is_over,
            before_save=batches.save_position,
            sound_step=self.resumption.step,
            skips_non_finite=self.config.non_finite == "skip",
            is_last=True,
            trackers=self.trackers,
        )
        last, seconds, earlier = stage.run(first, self.console)
        if best.step is not None and not self.was_complete:
            kept = "" if best.kept_in is None else f", kept in {best.kept_in}"
            early = " (stopped early)" if int(last.step) < self.steps else ""
            self.console.print(
                f"trained to step {int(last.step)}{early}; "
                f"the lowest held-out loss was at step {best.step}{kept}",
                markup=False,
            )
        return last, seconds, earlier

    def training_parts(self) -> tuple[Partition, TrainState, TrainStep]:
        """The model taken apart, the state before the first step of training, and that step."""
        partition, trainable, share = split_trainable(self.model, self.config.train)
        optimizer = make_optimizer(self.config.optimizer, self.steps)
        first = init_train_state(trainable, share, optimizer, jax.random.key(self.config.seed))
        step = make_train_step(
            partition,
            optimizer,
            mag_schedule=self.config.mag,
            remat=self.config.remat,
            distill=self.config.distill,
            accumulate=self.config.accumulate,
        )
        return partition, self.placement.place(first), step

    def _is_evaluated(self, step: int) -> bool:
        """Whether the held-out loss is measured after a step of training."""
        every = self.config.eval_every
        if not every:
            return False
        # The last step is measured in any case, once training is over.
        return step % every == 0 if step < self.steps else self.config.keep_best

    @property
    def steps(self) -> int:
        """Steps of training on text."""
        return self.config.total_steps(self.data.train.num_rows)

    def held_out(self, model: CausalLM, *, use_memory: bool = True) -> HeldOut | None:
        """Losses on the held-out rows; None: there are none."""
        source = self.data.eval
        if source is None:
            return None
        long = source.sequence_length > self.config.data.sequence_length
        size = 1 if long else self.config.batch_size
        return evaluate_held_out(
            *(model, source, self.placement.put), batch_size=size, use_memory=use_memory
        )

    def show_sample(self, when: str, model: CausalLM) -> None:
        """Prints the model's continuation of the sample prompt."""
        if not self.config.sample_tokens:
            return
        prompt = self.config.sample_prompt
        tokens = text_tokens(self.tokenizer, prompt)[None]
        key = jax.random.key(self.config.seed)
        result = generate(model, tokens, self.config.sample_tokens, _TEMPERATURE, key, top_p=_TOP_P)
        new = np.asarray(result.tokens[0, : int(result.lengths[0])])
        text = self.tokenizer.decode(new, skip_special_tokens=True)
        self.samples[when] = f"{prompt}{text}"
        self.console.print(f"--- {when} ---\n{prompt}{text}\n", markup=False)

    def questions(self) -> Questions | None:
        """Questions about text beyond the window; None without recall rows."""
        source, window = self.data.eval, self.window
        if not self.config.data.recall or source is None or window is None:
            return None
        return Questions(
            self.tokenizer,
            source.tokens[source.segment_ids != 0],
            length=self.config.data.sequence_length,
            window=window,
            seed=self.resumption.record.seed,
        )

    @functools.cached_property
    def placement(self) -> Placement:
        """Where batches and states lie."""
        return Placement(mesh=self.mesh, rows_per_step=self.config.rows_per_step)

    @functools.cached_property
    def batches(self) -> TrainingBatches:
        """The batches of training."""
        return TrainingBatches(
            source=self.data.train,
            placement=self.placement,
            model=self.model.config,
            tokenizer=self.tokenizer,
            windows=self._windows(),
            seed=self.config.seed,
            output=self.config.output,
        )

    def _fitting(self) -> Fitting:
        assert self.fit_rows is not None
        return Fitting.of(
            self.model,
            self.config.fit,
            folder=self.config.output,
            rows=self.fit_rows,
            windows=self._windows(),
            put=self.placement.put,
            seed=self.config.seed,
            checkpoint_every=self.config.checkpoint_every,
            keep_last=self.config.keep_last,
            trackers=self.trackers,
            finish_record=self._with_memory,
        )

    @functools.cached_property
    def _telemetry(self) -> Telemetry | None:
        """None: no memory runs, or only a stream has rows."""
        if not runs_memory(self.model.config, self.model.liza):
            return None
        source = self.data.train if self.data.eval is None else self.data.eval
        if not isinstance(source, TokenBatchSource):
            return None
        first = source.batch_at(0, 1, self.config.seed)
        length = self.config.data.sequence_length
        if self.mesh is not None and self.mesh.shape["context"] > 1:
            # Every device reads the row whole.
            length = min(length, _WHOLE_ROW)
        row = begin_of(first, length, self.window)
        return Telemetry(
            row=self.placement.put(row), every=self.config.checkpoint_every, console=self.console
        )

    def _with_memory(
        self, partition: Partition, state: TrainState, record: StepRecord, *, is_last: bool
    ) -> StepRecord:
        """A step's record, now and then with what the memory of each layer does."""
        if self._telemetry is None:
            return record
        return self._telemetry.add(
            record,
            lambda: partition.merge(state.trainable, state.share, partition.frozen),
            is_last=is_last,
        )

    def _windows(self) -> WindowRange | None:
        liza = self.model.liza
        return WindowRange.checked(
            self.config.window_range, None if liza is None else liza.softmax_window
        )


def _load_data(
    config: FinetuneConfig,
    tokenizer: "PreTrainedTokenizerFast",
    resumption: Resumption,
    console: Console,
) -> TokenData | StreamData:
    window = None if config.memory is None else config.memory.softmax_window
    data = load_run_data(config, tokenizer, resumption.record.seed, window, resumption.files)
    console.print(data.describe(config.rows_per_step), markup=False)
    print_bad_rows(data.bad_rows, console)
    return data


def _load_model(config: FinetuneConfig, mesh: "Mesh | None", console: Console) -> CausalLM:
    # What a run has trained is read and compared by all processes.
    together = contextlib.nullcontext() if find_checkpoint(config.model) else failing_together()
    with together:
        model = load_pretrained(
            config.model,
            config.memory,
            config.adapters,
            jnp.dtype(config.dtype),
            base_dtype=config.base_dtype,
            mesh=mesh,
            seed=config.seed,
        )
    warm_up(model)
    liza = config.memory
    is_idle = liza is not None and liza.writes == "evicted"
    if is_idle and not runs_memory(model.config, liza):
        console.print(_IDLE)
    return model


def _record(rate: Any, step: int, metrics: StepMetrics, seconds: float, tokens: int) -> StepRecord:
    shares = (float(x) for x in (metrics.mu_mean, metrics.mu_min, metrics.mu_max))
    mean, least, most = (None if math.isnan(share) else share for share in shares)
    return StepRecord(
        step=step,
        loss=float(metrics.loss),
        tokens_per_s=tokens / seconds,
        learning_rate=float(jnp.asarray(rate(step - 1))),
        grad_norm=float(metrics.grad_norm),
        seconds=seconds,
        mu_mean=mean,
        mu_min=least,
        mu_max=most,
    )
