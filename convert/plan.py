"""Turns a family's rules into the tensor conversions of one model."""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from convert.errors import ConversionError, listing
from convert.formats import TensorInfo
from convert.rules import Rule, Shape, Transform

_LAYER = "layers.{layer}."
_EXPERT = "{expert}"

LayerLocation = Callable[[int, str], tuple[int, int] | None]
"""Layer of the checkpoint and our parameter in it -> (stack, index on the stacked axis); None if
the layer lacks the parameter."""


@dataclass(frozen=True)
class Slot:
    """The place of one of our arrays: a parameter, or one layer or expert of a stacked one."""

    path: str
    """Dot-joined path of the parameter, e.g. "stacks.0.mlp.up_proj.kernel"."""
    index: tuple[int, ...]
    """Index on the leading axes of a stacked parameter; empty: the whole parameter."""
    shape: Shape
    """Shape of the array, without those axes."""


@dataclass(frozen=True)
class Conversion:
    """One rule applied to one layer."""

    sources: tuple[str, ...]
    slots: tuple[Slot, ...]
    transform: Transform

    @property
    def source_shapes(self) -> tuple[Shape, ...]:
        """The shapes that the stored tensors must have."""
        shapes = self.transform.stored_shapes([slot.shape for slot in self.slots])
        return tuple(tuple(shape) for shape in shapes)


def build_plan(
    rules: Iterable[Rule],
    parameters: Mapping[str, Shape],
    num_layers: int,
    locate: LayerLocation,
) -> tuple[Conversion, ...]:
    """Applies a family's rules to the parameters of one model.

    Args:
      rules: the family's key table.
      parameters: shape of every parameter that a checkpoint must hold, by dot-joined path.
      num_layers: layers of the model.
      locate: place of each layer's parameters in the model's stacks.

    Returns:
      The conversions, embedding and layers in the order of the rules. They fill every one of
      `parameters` exactly once.

    Raises:
      ConversionError: if a parameter is filled by no rule, or by more than one.
    """
    plan: list[Conversion] = []
    for rule in rules:
        if any(_LAYER in target for target in rule.targets):
            for layer in range(num_layers):
                if location := locate(layer, rule.targets[0]):
                    plan.extend(_apply(rule, parameters, layer, location))
        else:
            plan.extend(_apply(rule, parameters, None, None))
    _check_coverage(plan, parameters)
    return tuple(plan)


def _apply(
    rule: Rule,
    parameters: Mapping[str, Shape],
    layer: int | None,
    location: tuple[int, int] | None,
) -> list[Conversion]:
    """The conversions of one rule in one layer: one, or one for each expert, or none."""
    index: tuple[int, ...] = ()
    paths = rule.targets
    if location is not None:
        stack, place = location
        index = (place,)
        paths = tuple(path.replace(_LAYER, f"stacks.{stack}.") for path in paths)
    present = [path for path in paths if path in parameters]
    if not present:
        return []
    if len(present) != len(paths):
        raise ConversionError(
            f"The rule for {listing(rule.sources)} fits the model only in part: it has "
            f"{listing(present)} of {listing(paths)}."
        )
    indices: list[tuple[int, ...]] = [index]
    if any(_EXPERT in source for source in rule.sources):
        count = parameters[paths[0]][len(index)]
        indices = [(*index, expert) for expert in range(count)]
    return [
        Conversion(
            tuple(_fill(source, layer, place[-1] if place else None) for source in rule.sources),
            tuple(Slot(path, place, parameters[path][len(place) :]) for path in paths),
            rule.transform,
        )
        for place in indices
    ]


def _fill(source: str, layer: int | None, expert: int | None) -> str:
    return source.replace("{layer}", str(layer)).replace(_EXPERT, str(expert))


def _check_coverage(plan: Sequence[Conversion], parameters: Mapping[str, Shape]) -> None:
    filled = Counter((slot.path, slot.index) for move in plan for slot in move.slots)
    twice = [f"{path}{list(index)}" for (path, index), count in filled.items() if count > 1]
    if twice:
        raise ConversionError(f"More than one rule fills {listing(twice)}.")
    counts = Counter(path for path, _ in filled)
    depths = {path: len(index) for path, index in filled}
    empty = [
        path
        for path, shape in parameters.items()
        if counts[path] != math.prod(shape[: depths.get(path, 0)])
    ]
    if empty:
        raise ConversionError(f"No rule of the family fills {listing(empty)}.")


def match_names(
    plan: Sequence[Conversion], tensors: Iterable[str], prefix: str
) -> tuple[Conversion, ...]:
    """Adapts a plan to a checkpoint without the top-level prefix.

    Args:
      plan: the conversions.
      tensors: names of the tensors in the checkpoint.
      prefix: the prefix that may be missing, e.g. "model.".

    Returns:
      The plan; sources lose the prefix if the checkpoint has only that form.
    """
    present = set(tensors)

    def name(source: str) -> str:
        bare = source.removeprefix(prefix)
        return bare if bare in present and source not in present else source

    return tuple(dataclasses.replace(move, sources=tuple(map(name, move.sources))) for move in plan)


def check_tensors(
    plan: Sequence[Conversion],
    tensors: Mapping[str, TensorInfo],
    is_ignored: Callable[[str], bool],
) -> None:
    """Checks that a checkpoint holds exactly the tensors that a plan reads.

    Args:
      plan: the conversions.
      tensors: tensors of the checkpoint.
      is_ignored: whether a tensor may stay unread.

    Raises:
      ConversionError: naming every missing, unexpected and misshapen tensor.
    """
    expected = {
        source: shape
        for move in plan
        for source, shape in zip(move.sources, move.source_shapes, strict=True)
    }
    if problems := tensor_problems(expected, tensors, is_ignored):
        raise ConversionError(
            "The tensors of the checkpoint do not fit its configuration; check that both belong "
            f"together. {problems}."
        )


def tensor_problems(
    expected: Mapping[str, Shape],
    tensors: Mapping[str, TensorInfo],
    is_ignored: Callable[[str], bool],
) -> str:
    """Names every missing, unexpected and misshapen tensor; empty if there is none."""
    missing = [name for name in expected if name not in tensors]
    unexpected = [name for name in tensors if name not in expected and not is_ignored(name)]
    misshapen = [
        f"{name} {list(tensors[name].shape)} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    problems = [
        f"{kind}: {listing(names)}"
        for kind, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("misshapen", misshapen),
        )
        if names
    ]
    return "; ".join(problems)
