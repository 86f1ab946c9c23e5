"""The widths of a pruned model that its config does not say, and how a freshly built model takes them.

Nothing here is imported but torch and `forwards`: `remote_code` copies both files as they are beside the weights, so
that a pruned model also loads where hf_subprune is not installed.
"""

import copy
import hashlib
import inspect
import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..models.forwards import BYPASSED, CUT_ARGUMENTS, INNER_WIDTH, adapted, kept_entries

FORMAT = 2
"""Version of the stored entry: files of a later one are refused, those of 1 differ in where their entry stands."""

_SECTIONS = ("format", "shapes", "attributes", "arguments", "bypassed")
"""What the digest is of."""

# More than any model has; an entry that somebody made up must not take long to refuse.
_MOST_DIMS, _MOST_OUTPUTS, _MOST_RENAMES = 8, 64, 256


@dataclass(frozen=True)
class LayoutSpec:
    """How a pruned model differs from the one that its config builds.

    Args:
        shapes: Dotted path of a parameter or buffer -> its shape. Every dimension is at most what the config builds.
        attributes: Dotted path of a module (`""` is the model) -> integer attributes that the forward reads, such as
            `{"in_features": 40}`. A name `"config.x"` is the value `x` of a config that this module alone reads.
        arguments: Dotted path of a module -> what its forward is given and cuts: argument -> `(dim, entries, kept)`,
            the dimension, how many entries the argument has along it, and how many of them are kept.
        bypassed: Dotted path of a module that has no unit left and is not run -> `(consumer, entries)`: the path in it
            of the linear that gives its bias, `"."` for itself and `""` for none, and the entries of the tuple that it
            returns, or 0.
    """

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    attributes: dict[str, dict[str, int]] = field(default_factory=dict)
    arguments: dict[str, dict[str, tuple[int, int, int]]] = field(default_factory=dict)
    bypassed: dict[str, tuple[str, int]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.shapes or self.attributes or self.arguments or self.bypassed)

    @property
    def modules(self) -> dict[str, set[str]]:
        """Dotted path of each module that differs -> names of its tensors that differ."""
        names: dict[str, set[str]] = {path: set() for path in (*self.attributes, *self.arguments, *self.bypassed)}
        for tensor in self.shapes:
            path, _, leaf = tensor.rpartition(".")
            names.setdefault(path, set()).add(leaf)
        return names

    def restricted_to(self, prefix: str) -> "LayoutSpec":
        """The entries below the module `prefix`, under their full names."""

        def below(entries: dict[str, Any]) -> dict[str, Any]:
            return {path: value for path, value in entries.items() if _is_below(path, prefix)}

        return LayoutSpec(below(self.shapes), below(self.attributes), below(self.arguments), below(self.bypassed))

    def to_dict(self) -> dict:
        """JSON-ready form, with a digest that betrays later damage."""
        content = {
            "format": FORMAT,
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "attributes": {path: dict(values) for path, values in self.attributes.items()},
        }
        if self.arguments:
            content["arguments"] = {
                path: {name: list(sizes) for name, sizes in cut.items()} for path, cut in self.arguments.items()
            }
        if self.bypassed:
            content["bypassed"] = {path: list(how) for path, how in self.bypassed.items()}
        return {**content, "digest": _digest(content)}

    @classmethod
    def from_dict(cls, entry: dict) -> "LayoutSpec":
        """Read what `to_dict` wrote.

        Raises:
            ValueError: The entry is of a later format, incomplete, of wrong types, or changed since it was written.
        """
        version = entry.get("format")
        if type(version) is int and version > FORMAT:
            raise ValueError(
                f"this model's subprune entry has format {version}, this hf_subprune reads up to {FORMAT}: "
                "pip install -U hf_subprune"
            )
        damaged = "the subprune entry of this model's config.json is damaged ({}): restore config.json as it was saved"
        for key in ("format", "shapes", "attributes", "digest"):
            if key not in entry:
                raise ValueError(damaged.format(f"{key!r} is missing"))
        shapes, attributes = entry["shapes"], entry["attributes"]
        for name, shape in shapes.items() if isinstance(shapes, dict) else [("shapes", shapes)]:
            if not isinstance(shape, (list, tuple)) or not all(type(size) is int and size >= 0 for size in shape):
                raise ValueError(damaged.format(f"shape of {name!r} is {shape!r}, not a list of sizes"))
        for path, values in attributes.items() if isinstance(attributes, dict) else [("attributes", attributes)]:
            if not isinstance(values, dict) or not all(type(value) is int for value in values.values()):
                raise ValueError(damaged.format(f"attributes of {path!r} are {values!r}, not names with integers"))
        arguments = entry.get("arguments", {})
        for path, cut in arguments.items() if isinstance(arguments, dict) else [("arguments", arguments)]:
            if not isinstance(cut, dict) or not all(map(_are_sizes, cut.values())):
                raise ValueError(damaged.format(f"arguments of {path!r} are {cut!r}, not names with three integers"))
        bypassed = entry.get("bypassed", {})
        for path, how in bypassed.items() if isinstance(bypassed, dict) else [("bypassed", bypassed)]:
            if not _is_bypass(how):
                raise ValueError(damaged.format(f"{path!r} is bypassed as {how!r}, not by a name and a number"))
        if type(version) is not int:
            raise ValueError(damaged.format(f"its format is {version!r}"))
        content = {key: entry[key] for key in _SECTIONS if key in entry}
        if _digest(content) != entry["digest"]:
            raise ValueError(damaged.format("its digest does not match its shapes and attributes"))
        return cls(
            {name: tuple(shape) for name, shape in shapes.items()},
            {path: dict(values) for path, values in attributes.items()},
            {
                path: {name: (dim, entries, kept) for name, (dim, entries, kept) in cut.items()}
                for path, cut in arguments.items()
            },
            {path: (consumer, entries) for path, (consumer, entries) in bypassed.items()},
        )


def _are_sizes(values: object) -> bool:
    """Whether something is a dimension, a number of entries and how many of them are kept."""
    if not isinstance(values, (list, tuple)) or len(values) != 3 or any(type(value) is not int for value in values):
        return False
    return 0 <= values[2] <= values[1] and values[1] > 0


def _is_bypass(values: object) -> bool:
    """Whether something is the path of a consumer and a number of outputs."""
    if not isinstance(values, (list, tuple)) or len(values) != 2 or type(values[1]) is not int:
        return False
    return isinstance(values[0], str) and 0 <= values[1] <= _MOST_OUTPUTS


def apply_spec(model: nn.Module, spec: LayoutSpec) -> LayoutSpec:
    """Shrink a freshly built `model` (on meta or not) in place to the widths of `spec`; a second time changes nothing.

    The leading entries of each tensor stay, so that a model built with random weights stays initialised; values that
    matter come from the checkpoint. Resized buffers become persistent: built from the config they would be too large.

    Args:
        model: What the config builds: the class that was pruned, the base model inside it, or a class around it.
        spec: Widths under the names of the model that was saved.

    Returns:
        The widths that `model` now has, under its own names.

    Raises:
        ValueError: `spec` names nothing of this model, could mean several parts of it, or does not fit its tensors.
            Nothing is larger than the config builds it, and no name is set that is not a size there: whoever wrote the
            entry can make a model narrower, and no more.
    """
    rename = _match(spec, model)
    applied = LayoutSpec()
    forwards = {
        path: (spec.attributes.get(path, {}).get(INNER_WIDTH), spec.arguments.get(path, {}), spec.bypassed.get(path))
        for path in rename
    }
    for path, how in forwards.items():
        _check_forward(model.get_submodule(rename[path]), *how, path)
    for tensor, shape in spec.shapes.items():
        path, _, leaf = tensor.rpartition(".")
        if path in rename:
            _narrow(model.get_submodule(rename[path]), leaf, shape, tensor)
            applied.shapes[_join(rename[path], leaf)] = shape
    for path, values in spec.attributes.items():
        if path in rename:
            module = model.get_submodule(rename[path])
            for name, value in values.items():
                if name != INNER_WIDTH:
                    _set_integer(module, name, value, path)
            applied.attributes[rename[path]] = dict(values)
    for path, (width, cut, bypassed) in forwards.items():
        if width is not None or cut or bypassed:
            _adapt(model.get_submodule(rename[path]), width, cut, bypassed)
            if cut:
                applied.arguments[rename[path]] = dict(cut)
            if bypassed:
                applied.bypassed[rename[path]] = bypassed
    return applied


def _check_forward(
    module: nn.Module,
    width: int | None,
    cut: dict[str, tuple[int, int, int]],
    bypassed: tuple[str, int] | None,
    path: str,
) -> None:
    """Refuse what the forward is not given, more than a module as it is built has units for, and other consumers."""
    if not vars(module).keys().isdisjoint((INNER_WIDTH, CUT_ARGUMENTS, BYPASSED)):
        return  # a second time: it has been narrowed since
    given = inspect.signature(type(module).forward).parameters
    most = sum(parameter.numel() for parameter in module.parameters())
    damaged = f"{path} was saved with {{}}, which {type(module).__name__} has not: restore config.json as it was saved"
    if width is not None and not 0 < width <= most:
        raise ValueError(damaged.format(f"an inner width of {width}"))
    for name, (dim, entries, _) in cut.items():
        if name not in given or not -_MOST_DIMS <= dim < _MOST_DIMS or entries > most:
            raise ValueError(damaged.format(f"{entries} entries of its argument {name!r} along dimension {dim}"))
    if bypassed is not None:
        inside = dict(module.named_modules()).get("" if bypassed[0] == "." else bypassed[0])
        if inside is None or next(inside.parameters(), None) is None:
            raise ValueError(damaged.format(f"a consumer {bypassed[0]!r}"))


def _adapt(
    module: nn.Module,
    width: int | None,
    cut: dict[str, tuple[int, int, int]],
    bypassed: tuple[str, int] | None,
) -> None:
    """Let the forward of `module` be as `LayoutSpec` says; which entries of arguments, the checkpoint says."""
    device = next(module.parameters()).device
    for name, (_, _, kept) in cut.items():
        if kept_entries(name) not in module._buffers:
            module.register_buffer(kept_entries(name), torch.arange(kept, device=device))
    sizes = {name: (dim, entries) for name, (dim, entries, _) in cut.items()}
    vars(module).update(adapted(module, width, sizes, bypassed))


def adaptations(
    module: nn.Module,
) -> tuple[dict[str, int], dict[str, tuple[int, int, int]], tuple[str, int] | None]:
    """How the forward of `module` was adapted, as in a `LayoutSpec`: attributes, arguments, and how it is bypassed."""
    held = vars(module)
    cut = {
        name: (dim, entries, len(module.get_buffer(kept_entries(name))))
        for name, (dim, entries) in held.get(CUT_ARGUMENTS, {}).items()
    }
    return ({INNER_WIDTH: held[INNER_WIDTH]} if INNER_WIDTH in held else {}), cut, held.get(BYPASSED)


def _set_integer(module: nn.Module, name: str, value: int, path: str) -> None:
    """Set an integer attribute that exists; `"config.x"` is set in a copy of the config for this module alone."""
    attribute = name.removeprefix("config.")
    owner = module if attribute == name else vars(module).get("config")
    built = vars(owner).get(attribute) if owner is not None and not attribute.startswith("_") else None
    if type(built) is not int or not 0 <= value <= built:
        raise ValueError(
            f"{path} was saved with {name}={value}, but {type(module).__name__} has no {name} of that size or more "
            "here: load with the version of transformers that config.json names, or restore config.json"
        )
    if owner is not module:
        owner = module.config = copy.deepcopy(module.config)
    setattr(owner, attribute, value)


def _narrow(module: nn.Module, leaf: str, shape: tuple[int, ...], name: str) -> None:
    """Cut the parameter or buffer `leaf` of `module` to its leading `shape` entries."""
    tensor = getattr(module, leaf)
    if tensor.dim() != len(shape) or any(new > old for new, old in zip(shape, tensor.shape, strict=True)):
        raise ValueError(
            f"{name} was saved with shape {shape}, which does not fit inside the shape {tuple(tensor.shape)} that the "
            "config builds: config.json was changed after pruning (restore it), or another class is being loaded"
        )
    if tuple(tensor.shape) != tuple(shape):
        kept = tensor.detach()[tuple(slice(size) for size in shape)].clone()
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(kept, requires_grad=tensor.requires_grad)
        else:
            module._buffers[leaf] = kept
    if leaf in module._buffers:
        module._non_persistent_buffers_set.discard(leaf)


def _match(spec: LayoutSpec, model: nn.Module) -> dict[str, str]:
    """Module path in `spec` -> module path in `model`, for the modules that `model` has.

    One rename holds for the whole spec: none, `base_model_prefix` added or stripped, else any leading path added or
    stripped, provided that only one fits.
    """
    if not spec:
        return {}
    found = dict(model.named_modules())
    wanted = spec.modules

    def fits(path: str, names: set[str]) -> bool:
        held = {**found[path]._parameters, **found[path]._buffers} if path in found else {}
        return path in found and all(held.get(name) is not None for name in names)

    def renamed(strip: str, add: str) -> dict[str, str]:
        pairs = {path: _join(add, _strip(path, strip)) for path in wanted if _is_below(path, strip)}
        return {path: target for path, target in pairs.items() if fits(target, wanted[path])}

    base = getattr(model, "base_model_prefix", "")
    strip, add = max([("", ""), ("", base), (base, "")], key=lambda rename: len(renamed(*rename)))
    if usual := renamed(strip, add):
        for path in wanted.keys() - usual.keys():
            if _is_below(path, strip) and _join(add, _strip(path, strip)) in found:
                raise ValueError(
                    f"the pruned widths are of {', '.join(sorted(wanted[path]))} in {path!r}, where "
                    f"{type(model).__name__} has no such tensors: restore config.json as it was saved"
                )
        return usual
    possible = (matched for rename in _renames(wanted, found) if (matched := renamed(*rename)))
    matches = list(itertools.islice(possible, 2))
    if len(matches) == 1:
        return matches[0]
    example = repr(next(iter(wanted)))
    if not matches:
        raise ValueError(
            f"the pruned widths are of modules such as {example}, which {type(model).__name__} does not have: load "
            "the class that was pruned, the model inside it, or a class around it"
        )
    places = " or ".join(sorted(repr(next(iter(matched.values()))) for matched in matches))
    raise ValueError(
        f"the pruned widths are of modules such as {example}, which could mean {places} of {type(model).__name__}: "
        "load the class that was pruned and take the part from it"
    )


def _renames(wanted: Iterable[str], found: Iterable[str]) -> set[tuple[str, str]]:
    """Leading paths to strip from, or to add to, the `wanted` paths so that some of them are among the `found`."""
    found, wanted = set(found), set(wanted)
    renames = {(path[: -len(end) - 1], "") for path in wanted for end in _endings(path) if end in found}
    renames |= {("", path[: -len(end) - 1]) for path in found for end in _endings(path) if end in wanted}
    if len(renames) > _MOST_RENAMES:
        raise ValueError(
            f"the pruned widths could mean {len(renames)} different parts of this model: restore config.json as it "
            "was saved, or load the class that was pruned"
        )
    return renames


def _endings(path: str) -> list[str]:
    """`"a.b.c"` -> `["b.c", "c"]`."""
    parts = path.split(".")
    return [".".join(parts[cut:]) for cut in range(1, len(parts))]


def _is_below(path: str, prefix: str) -> bool:
    return not prefix or path == prefix or path.startswith(prefix + ".")


def _strip(path: str, prefix: str) -> str:
    return path[len(prefix) :].removeprefix(".")


def _join(prefix: str, path: str) -> str:
    return ".".join(part for part in (prefix, path) if part)


def _digest(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
