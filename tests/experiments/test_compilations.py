"""A run compiles each of its programs once, whatever its batches, steps and evaluations."""

import pytest

from experiments.data import DataConfig
from experiments.finetune import finetune
from experiments.training import FinetuneConfig
from experiments.training.config import FitConfig, HeldOutConfig, ShareConfig
from tests.compilations import count_compilations
from tptt_jax import LizaConfig, LoraConfig

FITTED = {
    "liza": LizaConfig(softmax_window=8),
    "fit": FitConfig(steps=3, distill_steps=3, length=32),
    "window_range": (4, 8),
}
SCHEDULED = {
    "liza": LizaConfig(writes="all", mag="scheduled"),
    "share": ShareConfig(mag_schedule="gradual"),
}


@pytest.mark.parametrize(
    ("options", "fits"), [(FITTED, 1), (SCHEDULED, 0)], ids=["fitted", "scheduled share"]
)
def test_a_run_compiles_its_steps_once(options, fits, tiny_model_dir, tmp_path):
    config = FinetuneConfig(
        model=str(tiny_model_dir),
        output=tmp_path / "run",
        # Three rows are held out: the last batch of an evaluation is not full.
        data=DataConfig(sequence_length=32, eval_tokens=80),
        lora=LoraConfig(rank=3),
        steps=5,
        held_out=HeldOutConfig(eval_every=1),
        sample_tokens=0,
        **options,
    )
    with count_compilations() as counts:
        finetune(config)
    assert counts["step"] == fits, "attention transfer, whatever the window"
    assert counts["train_step"] == fits + 1, "distillation, then training"
    # The base model before training, which another run may have compiled; then the Titan, with
    # its memory and without, however often it is evaluated.
    assert 2 <= counts["_losses_by_place"] <= 3
