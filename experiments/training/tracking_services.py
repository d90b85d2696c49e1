"""The services that a run can send its metrics to, each as a `Tracker`."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_PROJECT = "tptt-jax"


class WandbRun:
    """A run at Weights & Biases; WANDB_PROJECT, WANDB_ENTITY and WANDB_MODE apply."""

    def __init__(
        self, module: Any, output: Path, identity: str, settings: Mapping[str, Any]
    ) -> None:
        """Opens a run, or resumes the one with the same identity."""
        self._run = module.init(
            id=identity,
            name=output.name,
            dir=str(output),
            config=dict(settings),
            resume="allow",
        )
        # Stages count their own steps; wandb's own step would have to grow from call to call.
        try:
            for stage in ("transfer", "distill", "train"):
                self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        except BaseException:
            self._run.finish()
            raise

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes the metrics of one step."""
        stages = {name.partition("/")[0] for name in metrics}
        self._run.log(dict(metrics) | {f"{stage}/step": step for stage in stages})

    def close(self) -> None:
        """Ends the run."""
        self._run.finish()


class TrackioRun:
    """A run of trackio, which knows runs by their name."""

    def __init__(
        self, module: Any, output: Path, identity: str, settings: Mapping[str, Any]
    ) -> None:
        """Opens a run, or resumes the one with the same identity."""
        self._module = module
        module.init(
            project=_PROJECT,
            name=f"{output.name}-{identity}",
            config=dict(settings),
            resume="allow",
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes the metrics of one step."""
        self._module.log(dict(metrics), step=step)

    def close(self) -> None:
        """Ends the run."""
        self._module.finish()


REMEDIES = {
    "trackio": "run `trackio show` to see whether it works",
    "wandb": "run `wandb login`, or set WANDB_MODE=offline",
}
"""What to do where a service cannot start."""
OPENERS: dict[str, Callable[[Any, Path, str, Mapping[str, Any]], TrackioRun | WandbRun]] = {
    "trackio": TrackioRun,
    "wandb": WandbRun,
}
"""By the service's package: from that module, the run's directory, identity and settings."""
