"""Results of a run: perplexities with and without window and memory, a table, pictures."""

import math
import shlex
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from experiments.data import DataConfig
from experiments.data.rows import is_whole_text
from experiments.training.config import FinetuneConfig
from experiments.training.evaluation import recovered_gap
from experiments.training.measurements import (
    LABELS,
    Measured,
    State,
    read_measurements,
    write_measurements,
)
from experiments.training.pictures import plot_memory, plot_stages
from experiments.training.resume.settings import flag_with_value
from experiments.training.run import Run
from tptt_jax import CausalLM
from tptt_jax.processes import is_first_process, wait_for_all

# What evaluate needs to know of a run's data to read its held-out rows.
_DATA = ("path", "split", "revision", "format", "columns", "text_column", "max_rows")
_HELD_OUT = ("loss", "eval_length", "eval_rows")


def held_out_flags(config: FinetuneConfig) -> str:
    """Flags with which evaluate measures what a run has held out; "" if its defaults do."""
    data, plain = config.data, DataConfig()
    is_text = is_whole_text(data.path)
    names = _DATA if is_text else (*_DATA, *_HELD_OUT)
    given = {f"data.{name}": (getattr(data, name), getattr(plain, name)) for name in names}
    given |= {"tokens": (data.eval_tokens, 0)} if is_text else {"seed": (config.seed, 0)}
    flags = [
        flag_with_value(name, list(value) if isinstance(value, tuple) else value)
        for name, (value, default) in given.items()
        if value != default
    ]
    return "".join(f" {flag}" for flag in flags if flag)


class Outcome:
    """Measurements of a run, stored in `evaluation.json` so that a resumed run repeats none."""

    def __init__(self, run: Run) -> None:
        """Reads the measurements of earlier calls."""
        self._run = run
        self._questions = run.questions()
        self._file = run.config.output / "evaluation.json"
        self._found: dict[State, Measured] = {}
        self.is_new = not run.was_complete
        """Whether this call has measured or trained anything."""
        if self._file.exists():
            self._found = read_measurements(self._file)
        ended = self._found.keys() & {"after", "memory_off"}
        if ended and not run.was_complete:
            # The run continues, so measurements of its end are outdated; in the file too, as it may
            # be killed after its last step.
            self._found = {name: part for name, part in self._found.items() if name not in ended}
            self._save()
        # From here on all processes know the same.
        wait_for_all("evaluation.json is read")

    def measure(self, state: State, model: CausalLM, *, use_memory: bool = True) -> None:
        """Measures a model on the held-out rows, unless an earlier call did so."""
        if state in self._found:
            return
        held_out = self._run.held_out(model, use_memory=use_memory)
        if held_out is None:
            return
        answers = None
        if self._questions is not None and state in self._asked_states:
            answers = self._questions.ask(model, use_memory=use_memory)
        self._found[state] = Measured(held_out, answers)
        self.is_new = True
        self._save()

    def _save(self) -> None:
        if is_first_process():
            write_measurements(self._file, self._found)

    @property
    def _asked_states(self) -> tuple[State, State, State]:
        """The base model, and the memory off and on at the end of the run."""
        if self._run.steps:
            return ("before", "memory_off", "after")
        return ("before", "window", "fitted")

    def report(self) -> dict[str, Any]:
        """The --json report: perplexities, and recovered shares of the window's loss."""
        names: dict[State, str] = {"before": "perplexity_before", "after": "perplexity_after"}
        result: dict[str, Any] = {
            names.get(state, f"perplexity_{state}"): found.held_out.perplexity
            for state, found in self._found.items()
        }
        for state in ("fitted", "after"):
            gap = self._recovered(state)
            if gap is not None:
                result[f"recovered_gap_{state}"] = gap
        for state, (_, answers) in self._found.items():
            if answers is not None:
                asked = len(answers.texts)
                result[f"passkeys_{state}"] = {"right": answers.right, "asked": asked}
        return result

    def print(self, console: Console) -> None:
        """Prints the table, and commands for the next steps."""
        for table in self.tables():
            console.print(table)
        output, commands = self._run.config.output, self.next_commands().replace("\n", "\n  ")
        console.print(
            f"\nreport.html, metrics and checkpoints are in {output}; next:\n  {commands}",
            markup=False,
            soft_wrap=True,
        )

    def tables(self) -> list[Table]:
        """Perplexities, and answers to questions, as far as they were measured."""
        found = [self._table()] if self._found else []
        # A resumed run may have no questions although an earlier call did.
        asked = any(found.answers is not None for found in self._found.values())
        if self._questions is not None and asked:
            found.append(self._answers_table())
        return found

    def next_commands(self) -> str:
        """What to do with the run, a command per line."""
        output = str(self._run.config.output)
        run, exported = shlex.quote(output), shlex.quote(f"{output}-hf")
        return (
            f'python -m experiments.generate --adapter {run} --prompt "..."\n'
            f"python -m experiments.evaluate --models {run}{held_out_flags(self._run.config)}\n"
            f"python -m convert export {run} --output {exported}"
        )

    def plot(self) -> None:
        """Draws the stages of the run and perplexity by position, if there is anything new."""
        if not is_first_process():
            return
        config = self._run.config
        first = "loss.png" if self._run.steps else "fit.png"
        if not self.is_new and (config.output / first).is_file():
            return
        title = f"{config.model} on {config.data.shown}"
        losses = {state: found.held_out.loss for state, found in self._found.items()}
        plot_stages(
            config.output, title=title, before=losses.get("before"), after=losses.get("after")
        )
        lines = {LABELS[state]: found.held_out.curve() for state, found in self._found.items()}
        if self._run.window is not None and lines:
            png = config.output / "memory.png"
            plot_memory(png, lines, window=self._run.window, title=title, summary=self.headline())

    def headline(self) -> str:
        """What the memory is worth, in one line; empty if it was not measured on and off."""
        pairs: tuple[tuple[State, State], ...] = (("memory_off", "after"), ("window", "fitted"))
        for off, on in pairs:
            if {off, on} <= self._found.keys() and self._run.window is not None:
                break
        else:
            return ""
        window, losses = self._run.window, {}
        for state in (off, on):
            held_out = self._found[state].held_out
            losses[state] = held_out.loss_between(window, len(held_out.nats))
        if any(map(math.isnan, losses.values())):
            return ""
        line = (
            f"Beyond the window of {window}: perplexity {math.exp(losses[off]):.1f} without the "
            f"memory, {math.exp(losses[on]):.1f} with it"
        )
        answers = [self._found[state].answers for state in (off, on)]
        if answers[0] is None or answers[1] is None:
            return line
        without, given = answers[0].right, answers[1]
        return f"{line}; {without} and {given.right} of {len(given.texts)} pass keys"

    def _table(self) -> Table:
        table = Table(title="Perplexity of held-out text", title_justify="left")
        table.add_column("")
        table.add_column("all tokens", justify="right")
        window = self._run.window
        if window is not None:
            table.add_column(f"beyond the window of {window}", justify="right")
            table.add_column("of the window's loss recovered", justify="right")
        for state, (held_out, _) in self._found.items():
            cells = [LABELS[state], f"{held_out.perplexity:.2f}"]
            if window is not None:
                beyond = held_out.loss_between(window, len(held_out.nats))
                gap = self._recovered(state)
                cells += [
                    "" if math.isnan(beyond) else f"{math.exp(beyond):.2f}",
                    "" if gap is None or state not in ("fitted",) else f"{gap:.0%}",
                ]
            table.add_row(*cells)
        return table

    def _recovered(self, state: State) -> float | None:
        found = self._found
        if not {"before", "window", state} <= found.keys():
            return None
        return recovered_gap(*(found[name].held_out.loss for name in ("before", "window", state)))

    def _answers_table(self) -> Table:
        assert self._questions is not None
        asked = self._questions.asked
        first, count = asked[0], len(asked)
        table = Table(
            title=f"Pass keys beyond the window of {self._run.window}, in {len(first.prompt)} "
            f"tokens of held-out text. The first text hides: {escape(first.hidden)}",
            title_justify="left",
        )
        table.add_column(escape(first.question))
        table.add_column("answer to the first", justify="right")
        table.add_column(f"right, of {count}", justify="right")
        labels = LABELS | {"window": "memory off", "fitted": "memory on"}
        labels |= {"memory_off": "memory off", "after": "memory on"}
        for state, (_, answers) in self._found.items():
            if answers is not None:
                table.add_row(labels[state], escape(answers.texts[0]), str(answers.right))
        return table
