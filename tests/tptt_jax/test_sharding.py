"""Meshes, specs, and training on eight simulated devices."""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from tests.contracts import random_tokens, randomize, relative_error
from tests.devices import run_on_devices
from tptt_jax import CausalLM, LizaConfig, LoraConfig, ModelConfig
from tptt_jax.config import AttentionConfig, ExpertsConfig
from tptt_jax.sharding import (
    MESH_AXES,
    RULES,
    batch_sharding,
    make_mesh,
    make_rules,
    name_axes,
    on_mesh,
    partition_spec,
    replicated,
    shard_model,
    sharding_of,
)
from tptt_jax.training.checkpoint import restore_trainable

MESH = AbstractMesh((2, 2, 1, 2), MESH_AXES)
LAYOUT = "data=2,fsdp=2,tensor=2"
CONFIG = ModelConfig.tiny(num_layers=2, mlp_dim=16, vocab_size=96)
EXPERTS = ModelConfig.tiny(
    family="olmoe",
    num_layers=2,
    mlp_dim=16,
    vocab_size=96,
    experts=ExpertsConfig(number=5, per_token=2),
    attention=AttentionConfig(qk_norm="full"),
)
LIZA = LizaConfig(writes="all", chunk_size=8, mag_init=0.3, memory_rank=2)
STEPS = 4
ADAPTER = "stacks.0.self_attn.q_proj.lora.b"


@pytest.mark.parametrize(
    "layout", ["data=0", "data=-1", "data=two", "data", "model=2", "data=2;fsdp=2", "=2"]
)
def test_layouts_that_cannot_be_read_are_refused(layout):
    with pytest.raises(ValueError, match="mesh must look like data=2,fsdp=2,tensor=2") as error:
        make_mesh(layout)
    assert repr(layout) in str(error.value)


def test_a_mesh_needs_enough_devices():
    have = len(jax.devices())
    with pytest.raises(ValueError, match=f"needs {8 * have} devices, there are {have}"):
        make_mesh(f"data={2 * have},tensor=4")


@pytest.mark.parametrize("layout", ["", "data=1", " tensor = 1, fsdp=1 "])
def test_axes_that_are_left_out_have_size_one(layout):
    assert dict(make_mesh(layout).shape) == dict.fromkeys(MESH_AXES, 1)


def test_rules_are_changed_one_by_one():
    assert make_rules([]) == RULES
    expected = {**RULES, "experts": "tensor", "mlp": "fsdp"}
    del expected["embed"]
    assert make_rules(["experts=tensor", "mlp=fsdp", "embed=none"]) == expected


@pytest.mark.parametrize("change", ["head=tensor", "heads=model", "heads", "heads=", "=tensor"])
def test_rules_that_cannot_be_read_are_refused(change):
    with pytest.raises(
        ValueError, match="must look like experts=tensor, with one of embed"
    ) as error:
        make_rules(["mlp=tensor", change])
    assert repr(change) in str(error.value)


SPECS = {
    "kernel": (("embed", "heads"), (32, 64), P("fsdp", "tensor")),
    "stacked kernel": (("embed", "heads"), (3, 32, 64), P(None, "fsdp", "tensor")),
    "output": (("heads", "embed"), (64, 32), P("tensor", "fsdp")),
    "adapter": (("embed", "rank"), (3, 32, 8), P(None, "fsdp", None)),
    "norm": (("norm",), (3, 32), P(None, None)),
    "odd vocabulary": (("vocab", "embed"), (97, 32), P(None, "fsdp")),
    "scalar": ((), (), P()),
}


@pytest.mark.parametrize(("axes", "shape", "want"), SPECS.values(), ids=SPECS)
def test_specs(axes, shape, want):
    assert partition_spec(axes, shape, MESH) == want


def _places(model, mesh, **options):
    return {
        ".".join(map(str, path)): sharding_of(variable, mesh, **options).spec
        for path, variable in nnx.to_flat_state(nnx.state(model))
    }


def test_channels_of_a_head_stay_together():
    """Four devices divide the channels of two KV heads evenly, but not the heads."""
    mesh = AbstractMesh((1, 1, 1, 4), MESH_AXES)
    model = nnx.eval_shape(lambda: CausalLM(CONFIG, LIZA, LoraConfig(rank=2), rngs=nnx.Rngs(0)))
    places, layer = _places(model, mesh), "stacks.0.self_attn"
    assert (CONFIG.num_heads, CONFIG.num_kv_heads) == (4, 2)
    for name in ("k_proj.kernel", "v_proj.kernel", "k_proj.lora.b", "memory.v_delta.b"):
        assert "tensor" not in places[f"{layer}.{name}"], name
    assert places[f"{layer}.q_proj.kernel"] == P(None, "fsdp", "tensor")
    assert places[f"{layer}.o_proj.kernel"] == P(None, "tensor", "fsdp")
    axis = model.stacks[0].self_attn.k_proj.kernel.get_metadata()["axes"][1]
    assert copy.deepcopy(axis) == axis == "kv_heads"
    assert pickle.loads(pickle.dumps(axis)).heads == 2


def test_rules_can_be_given():
    model = nnx.eval_shape(lambda: CausalLM(EXPERTS, rngs=nnx.Rngs(0)))
    up, with_experts = "stacks.0.mlp.up_proj.kernel", {**RULES, "experts": "tensor"}
    assert _places(model, MESH)[up] == P(None, None, "fsdp", "tensor")
    five = AbstractMesh((1, 1, 1, 5), MESH_AXES)
    assert _places(model, five, rules=with_experts)[up] == P(None, "tensor", "fsdp", None)
    # An axis of the mesh is used once: by the axis that comes first.
    sizes = (("experts", "embed", "mlp"), (4, 8, 8), MESH)
    assert partition_spec(*sizes, with_experts) == P("tensor", "fsdp", None)
    mine = AbstractMesh((2, 2), ("rows", "model"))
    assert _places(model, mine, rules={"mlp": "model"})[up] == P(None, None, None, "model")
    with pytest.raises(ValueError, match="the mesh axis 'data', the mesh has rows, model: use"):
        partition_spec(("mlp",), (8,), mine, {"mlp": "data"})


def test_flax_sees_where_parameters_are():
    model = nnx.eval_shape(lambda: CausalLM(CONFIG, LIZA, LoraConfig(rank=2), rngs=nnx.Rngs(0)))
    state = nnx.state(model)
    specs = nnx.get_partition_spec(name_axes(state, MESH))
    found = {".".join(map(str, path)): x for path, x in nnx.to_flat_state(specs)}
    found = {name: getattr(x, "get_value", lambda x=x: x)() for name, x in found.items()}
    assert found == _places(model, MESH)
    assert not any(
        "out_sharding" in variable.get_metadata() for _, variable in nnx.to_flat_state(state)
    )


def test_every_parameter_of_a_titan_has_a_place():
    model = nnx.eval_shape(lambda: CausalLM(CONFIG, LIZA, LoraConfig(rank=2), rngs=nnx.Rngs(0)))
    places = _places(model, MESH)
    layer = "stacks.0.self_attn"
    assert places["embed.embedding"] == P("tensor", "fsdp")
    assert places[f"{layer}.q_proj.kernel"] == P(None, "fsdp", "tensor")
    assert places[f"{layer}.o_proj.kernel"] == P(None, "tensor", "fsdp")
    assert places[f"{layer}.q_proj.lora.a"] == P(None, "fsdp", None)
    assert places[f"{layer}.q_proj.lora.b"] == P(None, None, "tensor")
    assert places[f"{layer}.memory.k_delta.b"] == P(None, None, "tensor")
    assert places[f"{layer}.mag.logit"] == P(None, "tensor")
    assert places["stacks.0.mlp.down_proj.kernel"] == P(None, "tensor", "fsdp")
    whole = {name for name, spec in places.items() if not any(spec)}
    assert whole == {"final_norm.weight", "stacks.0.attn_norm.weight", "stacks.0.mlp_norm.weight"}


def test_rows_of_a_batch_are_split_over_data_and_fsdp_and_tokens_over_context():
    mesh = make_mesh("")
    assert batch_sharding(mesh).spec == P(("data", "fsdp"), "context")
    assert batch_sharding(mesh, divide_rows=False).spec == P(None, "context")
    assert replicated(mesh).spec == P()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, project_dir: Path) -> dict[str, Any]:
    """What `run_on_eight_devices` has measured in a process of its own."""
    path = tmp_path_factory.mktemp("sharding")
    program = (
        f"from tests.tptt_jax.test_sharding import run_on_eight_devices as run; run({str(path)!r})"
    )
    run_on_devices(8, program, project_dir)
    return json.loads((path / "report.json").read_text())


def test_eight_devices_train_as_one_does(report):
    assert len(report["losses"]["one"]) == STEPS
    np.testing.assert_allclose(report["losses"]["eight"], report["losses"]["one"], rtol=1e-5)
    # The adapters did learn something: equal losses are not those of a model that stands still.
    assert report["losses"]["one"][-1] < report["losses"]["one"][0] - 0.01


@pytest.mark.parametrize("when", ["before", "after"])
def test_parameters_adapters_and_moments_stay_sharded(report, when):
    shares = report["shares"][when]
    layer = "stacks.0.self_attn"
    want = {
        f"{layer}.q_proj.lora.a": 1 / 2,
        f"{layer}.q_proj.lora.b": 1 / 2,
        f"{layer}.memory.v_delta.a": 1 / 2,
        f"{layer}.mag.logit": 1 / 2,
    }
    for name, share in want.items():
        assert shares["trainable"][name] == share
        moments = [value for path, value in shares["optimizer"].items() if name in path]
        assert moments == [share, share]
    assert shares["frozen"][f"{layer}.q_proj.kernel"] == 1 / 4
    assert shares["frozen"]["embed.embedding"] == 1 / 4
    assert shares["frozen"]["stacks.0.mlp.up_proj.kernel"] == 1 / 4


def test_loading_puts_tensors_into_their_shards(report):
    loaded = report["loaded"]
    assert loaded["equal"]
    layer = "stacks.0.self_attn"
    assert loaded["shares"]["embed.embedding"] == 1 / 4
    assert loaded["shares"][f"{layer}.q_proj.kernel"] == 1 / 4
    assert loaded["shares"][f"{layer}.o_proj.kernel"] == 1 / 4
    assert loaded["shares"][f"{layer}.q_proj.lora.a"] == 1 / 2
    assert loaded["shares"]["final_norm.weight"] == 1
    assert loaded["devices"] == [8]


def test_experts_on_eight_devices(report):
    """Each expert's matrices are split, and the tokens still meet the experts they chose."""
    assert report["experts"]["error"] <= 1e-5
    assert report["experts"]["share"] == 1 / 4


def test_one_device_loads_what_eight_have_saved(report):
    model = CausalLM(CONFIG, LIZA, LoraConfig(rank=2), rngs=nnx.Rngs(5))
    assert restore_trainable(Path(report["path"]) / "run", model) == STEPS
    values = {_dotted(path): x.get_value() for path, x in nnx.to_flat_state(nnx.state(model))}
    np.testing.assert_array_equal(values[ADAPTER], np.array(report["adapter"], np.float32))
    assert len(values[ADAPTER].sharding.device_set) == 1


def run_on_eight_devices(directory: str) -> None:
    """Trains on one device and on a mesh, loads onto the mesh, and writes report.json."""
    from convert import export_pretrained, load_pretrained
    from tptt_jax.training.checkpoint import RunCheckpoints

    mesh = make_mesh(LAYOUT)
    losses, shares = {}, {}
    losses["one"], _, _ = _train(None)
    losses["eight"], shares, state = _train(mesh)

    exported = randomize(CausalLM(CONFIG, rngs=nnx.Rngs(3)))
    export_pretrained(exported, Path(directory) / "model")
    model = load_pretrained(Path(directory) / "model", LIZA, LoraConfig(rank=2), mesh=mesh)
    values = dict(nnx.to_flat_state(nnx.state(model)))
    loaded = {
        "shares": _shares({_dotted(path): x.get_value() for path, x in values.items()}),
        "equal": all(
            np.array_equal(values[path].get_value(), x.get_value())
            for path, x in nnx.to_flat_state(nnx.state(exported))
        ),
        "devices": sorted({len(x.get_value().sharding.device_set) for x in values.values()}),
    }
    with RunCheckpoints(Path(directory) / "run") as checkpoints:
        checkpoints.save(state)
    adapter = np.asarray(state.trainable[ADAPTER]).tolist()
    report = {"losses": losses, "shares": shares, "loaded": loaded, "adapter": adapter}
    report |= {"path": directory, "experts": _run_experts(Path(directory) / "experts", mesh)}
    (Path(directory) / "report.json").write_text(json.dumps(report))


def _run_experts(path: Path, mesh: Any) -> dict[str, float]:
    """How far the logits of a model with experts are from those on one device."""
    from convert import export_pretrained, load_pretrained

    one = randomize(CausalLM(EXPERTS, rngs=nnx.Rngs(0)))
    export_pretrained(one, path)
    eight = load_pretrained(path, mesh=mesh)
    tokens = random_tokens((8, 12), vocab_size=EXPERTS.vocab_size)
    want = nnx.jit(lambda model, tokens: model(tokens).logits)(one, tokens)
    placed = jax.device_put(tokens, batch_sharding(mesh))
    got = nnx.jit(lambda model, tokens: model(tokens).logits)(eight, placed)
    kernel = eight.stacks[0].mlp.up_proj.kernel.get_value()
    return {
        "error": relative_error(got, want),
        "share": kernel.addressable_shards[0].data.size / kernel.size,
    }


def _train(mesh: Any) -> tuple[list[float], dict[str, Any], Any]:
    from tptt_jax.training.optimizer import OptimizerConfig, make_optimizer
    from tptt_jax.training.partition import split_trainable
    from tptt_jax.training.train_step import (
        Batch,
        init_train_state,
        make_train_step,
        place_state,
    )

    lora = LoraConfig(rank=2, dropout=0.1)
    model = randomize(CausalLM(CONFIG, LIZA, lora, rngs=nnx.Rngs(0)))
    if mesh is not None:
        shard_model(model, mesh)
    partition, trainable, share = split_trainable(model, "lora")
    optimizer = make_optimizer(
        OptimizerConfig(learning_rate=2e-3, lr_schedule="constant"), STEPS, partition
    )
    state = init_train_state(trainable, share, optimizer, jax.random.key(0))
    tokens = random_tokens((8, 24), vocab_size=CONFIG.vocab_size)
    batch = Batch(tokens, np.repeat([[1, 2, 0]], [9, 12, 3], axis=1) + 0 * tokens, tokens >= 0)
    if mesh is not None:
        state = place_state(state, mesh)
        batch = jax.device_put(batch, batch_sharding(mesh))
    step = make_train_step(partition, optimizer)
    frozen = {_dotted(path): x.get_value() for path, x in nnx.to_flat_state(partition.frozen)}
    losses, shares = [], {}
    for when in ("before", "after"):
        shares[when] = {
            "trainable": _shares(state.trainable),
            "frozen": _shares(frozen),
            "optimizer": _shares(
                {jax.tree_util.keystr(p): x for p, x in jax.tree.leaves_with_path(state.opt_state)}
            ),
        }
        for _ in range(STEPS if when == "before" else 0):
            with on_mesh(mesh):
                state, metrics = step(state, partition.frozen, batch)
            losses.append(float(metrics.loss))
    return losses, shares, state


def _shares(arrays: dict[str, jax.Array]) -> dict[str, float]:
    """How much of every array one device holds."""
    return {name: x.addressable_shards[0].data.size / x.size for name, x in arrays.items()}


def _dotted(path: tuple) -> str:
    return ".".join(map(str, path))
