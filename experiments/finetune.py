"""``python -m experiments.finetune``: gives a pretrained model a memory and trains it."""

import dataclasses
import math
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from convert import load_pretrained, load_tokenizer
from convert.files import atomic_file
from experiments.arguments import FinetuneConfig, resolved_yaml, run_configured
from experiments.checks import check_output, check_rows, describe_run
from experiments.data import TokenData, load_token_data
from experiments.interrupts import StopRequest
from experiments.packing import TokenBatch, TokenBatchSource
from experiments.process import prepare_process
from experiments.report import MetricsWriter, StepRecord, TrainingProgress, plot_run
from tptt_jax import CausalLM, generate
from tptt_jax.model import base_model
from tptt_jax.sharding import batch_sharding, make_mesh, replicated
from tptt_jax.training.checkpoint import RunCheckpoints, remove_checkpoints
from tptt_jax.training.description import write_description
from tptt_jax.training.optimizer import make_optimizer
from tptt_jax.training.partition import Partition, split_trainable
from tptt_jax.training.train_step import (
    Batch,
    StepMetrics,
    TrainState,
    eval_step,
    init_train_state,
    make_train_step,
    place_state,
)

if TYPE_CHECKING:
    from jax.sharding import Mesh
    from transformers import PreTrainedTokenizerFast

# Samples are not greedy: that sends small models round in circles.
_TEMPERATURE = 0.7
_TOP_P = 0.9


def finetune(config: FinetuneConfig) -> dict[str, Any]:
    """Runs a fine-tuning run, or goes on with it, and returns what --json prints."""
    prepare_process()
    console = Console(soft_wrap=True, highlight=False)
    run = Run.prepare(config, console)
    report: dict[str, Any] = {"output": str(config.output), "steps": run.steps}
    base = base_model(run.model)
    report["perplexity_before"] = run.perplexity(base, use_memory=False)
    run.show_sample("before", base)
    with RunCheckpoints(config.output) as checkpoints:
        state = run.resume(checkpoints)
        report["resumed_at"] = int(state.step)
        state, report["train_seconds"] = run.train(state, checkpoints)
    tuned = run.partition.merge(state.trainable, state.share, run.partition.frozen)
    report["perplexity_after"] = run.perplexity(tuned)
    if config.memory is not None and config.memory.softmax:
        report["perplexity_memory_off"] = run.perplexity(tuned, use_memory=False)
    run.show_sample("after", tuned)
    run.plot(report)
    run.say_next(report)
    return report


@dataclass(frozen=True, kw_only=True)
class Run:
    """What stays the same throughout a run."""

    config: FinetuneConfig
    console: Console
    tokenizer: "PreTrainedTokenizerFast"
    data: TokenData
    model: CausalLM
    partition: Partition
    initial: TrainState
    steps: int
    mesh: "Mesh | None"

    @classmethod
    def prepare(cls, config: FinetuneConfig, console: Console) -> "Run":
        """Loads everything, and claims the output directory once all of it is right."""
        mesh = None if config.mesh is None else make_mesh(config.mesh)
        check_rows(config.batch_size, mesh)
        description = describe_run(config)
        check_output(config, description)
        tokenizer = load_tokenizer(config.model)
        data = load_token_data(config.data, tokenizer, config.seed)
        console.print(data.describe())
        model = load_pretrained(
            config.model,
            config.memory,
            config.adapters,
            jnp.dtype(config.dtype),
            mesh=mesh,
            seed=config.seed,
        )
        partition, trainable, share = split_trainable(model, config.train)
        steps = config.total_steps(data.train.num_rows)
        optimizer = make_optimizer(config.optimizer, steps)
        initial = init_train_state(trainable, share, optimizer, jax.random.key(config.seed))
        count = sum(value.size for value in trainable.values())
        console.print(f"training {count:,} parameters ({config.train}) for {steps} steps")
        if not config.resume:
            remove_checkpoints(config.output)
        write_description(config.output, description)
        with atomic_file(config.output / "config.yaml") as path:
            path.write_text(resolved_yaml(dataclasses.replace(config, config=None)))
        return cls(
            config=config,
            console=console,
            tokenizer=tokenizer,
            data=data,
            model=model,
            partition=partition,
            initial=initial if mesh is None else place_state(initial, mesh),
            steps=steps,
            mesh=mesh,
        )

    def resume(self, checkpoints: RunCheckpoints) -> TrainState:
        """The last state that an earlier call has saved, or the initial one."""
        if checkpoints.latest_step is None:
            return self.initial
        state = checkpoints.restore(self.initial)
        self.console.print(f"resuming after step {int(state.step)} of {self.steps}")
        return state

    def train(self, state: TrainState, checkpoints: RunCheckpoints) -> tuple[TrainState, float]:
        """Trains to the last step; a request to stop saves first.

        Returns:
          The last state, and the seconds spent in steps.

        Raises:
          KeyboardInterrupt: after saving, if the run was asked to stop.
        """
        config, first = self.config, int(state.step)
        step = make_train_step(
            self.partition,
            make_optimizer(config.optimizer, self.steps),
            mag_schedule=config.mag,
            remat=config.remat,
        )
        rate = config.optimizer.schedule(self.steps)
        writer = MetricsWriter(config.output / "metrics.jsonl", resume_step=first)
        progress = TrainingProgress(self.steps, first_step=first, console=self.console)
        total = 0.0
        with StopRequest() as stop, writer, progress:
            batch, tokens = self._next_batch(first)
            for number in range(first, self.steps):
                start = time.perf_counter()
                state, metrics = step(state, self.partition.frozen, batch)
                # The call has only started the device, which works while the next batch is made.
                # What that takes beyond the step counts as part of it.
                counted, (batch, tokens) = tokens, self._next_batch(number + 1)
                jax.block_until_ready(metrics)
                seconds = time.perf_counter() - start
                total += seconds
                rate_now = float(jnp.asarray(rate(number)))
                record = _record(number + 1, metrics, seconds, counted, rate_now)
                self._check_loss(record.loss, number + 1)
                held_out = self._evaluate_midway(state, number + 1)
                record = dataclasses.replace(record, eval_loss=held_out)
                writer.write(record)
                progress.update(record)
                last = number + 1 == self.steps
                if last or stop.requested or (number + 1) % config.checkpoint_every == 0:
                    checkpoints.save(state)
                if stop.requested and not last:
                    progress.note(f"stopped after step {number + 1}: the same command goes on")
                    raise KeyboardInterrupt
        return state, total

    def perplexity(self, model: CausalLM, *, use_memory: bool = True) -> float | None:
        """Exp of the mean loss on what is held out; None if nothing is."""
        loss = self._held_out_loss(model, use_memory=use_memory)
        return None if loss is None else math.exp(min(loss, 700.0))

    def show_sample(self, when: str, model: CausalLM) -> None:
        """Prints how the model continues the sample prompt."""
        if not self.config.sample_tokens:
            return
        prompt = self.config.sample_prompt
        tokens = np.array([self.tokenizer(prompt)["input_ids"]], np.int32)
        key = jax.random.key(self.config.seed)
        result = generate(model, tokens, self.config.sample_tokens, _TEMPERATURE, key, top_p=_TOP_P)
        new = np.asarray(result.tokens[0, : int(result.lengths[0])])
        text = self.tokenizer.decode(new, skip_special_tokens=True)
        self.console.print(f"--- {when} ---\n{prompt}{text}\n", markup=False)

    def plot(self, report: dict[str, Any]) -> None:
        """Draws loss and share."""
        losses = [
            None if value is None else math.log(value)
            for value in (report["perplexity_before"], report["perplexity_after"])
        ]
        plot_run(
            self.config.output / "metrics.jsonl",
            self.config.output / "loss.png",
            title=f"{self.config.model} on {self.config.data.path}",
            eval_before=losses[0],
            eval_after=losses[1],
        )

    def say_next(self, report: dict[str, Any]) -> None:
        """Prints the results and the commands that go on from here."""
        for name, text in (
            ("perplexity_before", "base model, untouched"),
            ("perplexity_after", "after training"),
            ("perplexity_memory_off", "after training, memory off"),
        ):
            if report.get(name) is not None:
                self.console.print(f"held-out perplexity, {text}: {report[name]:.3f}")
        output = self.config.output
        self.console.print(
            f"\nmetrics, plot and checkpoints are in {output}; next:\n"
            f'  python -m experiments.generate --adapter {output} --prompt "..."\n'
            f"  python -m convert export {output} --output {output}-hf"
        )

    def _evaluate_midway(self, state: TrainState, step: int) -> float | None:
        every = self.config.eval_every
        if not every or step % every or step == self.steps:
            return None
        model = self.partition.merge(state.trainable, state.share, self.partition.frozen)
        return self._held_out_loss(model)

    def _held_out_loss(self, model: CausalLM, *, use_memory: bool = True) -> float | None:
        source: TokenBatchSource | None = self.data.eval
        if source is None:
            return None
        long = source.sequence_length > self.config.data.sequence_length
        # No result is looked at before all batches are on their way.
        sums = [
            eval_step(model, self._put(batch), use_memory=use_memory)
            for batch in source.batches(1 if long else self.config.batch_size)
        ]
        return sum(float(nats) for nats, _ in sums) / sum(float(count) for _, count in sums)

    def _next_batch(self, step: int) -> tuple[Batch, int]:
        """The batch of a step, on its way to the device, and its tokens without padding."""
        batch = self.data.train.batch_at(step, self.config.batch_size, self.config.seed)
        return self._put(batch), int(np.count_nonzero(batch.segment_ids))

    def _put(self, batch: TokenBatch) -> Batch:
        if self.mesh is None:
            return Batch(*jax.device_put(tuple(batch)))
        shards = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        even = len(batch.tokens) % shards == 0
        sharding = batch_sharding(self.mesh) if even else replicated(self.mesh)
        return Batch(*(jax.device_put(array, sharding) for array in batch))

    def _check_loss(self, loss: float, step: int) -> None:
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss is {loss} at step {step}: lower --learning-rate; the last checkpoint "
                f"before it is kept in {self.config.output}."
            )


def _record(
    step: int, metrics: StepMetrics, seconds: float, tokens: int, rate: float
) -> StepRecord:
    shares = {name: float(getattr(metrics, name)) for name in ("mu_mean", "mu_min", "mu_max")}
    return StepRecord(
        step=step,
        loss=float(metrics.loss),
        tokens_per_s=tokens / seconds,
        learning_rate=rate,
        grad_norm=float(metrics.grad_norm),
        seconds=seconds,
        **{name: None if math.isnan(value) else value for name, value in shares.items()},
    )


def main() -> None:
    """The command."""
    sys.exit(run_configured(finetune, FinetuneConfig, prog="python -m experiments.finetune"))


if __name__ == "__main__":
    main()
