"""How a pruned model is stored: widths in its config where that can say them (stock), else beside it (ragged).

Both are decided on the model as it is, however it was pruned: it is compared with a skeleton, the model that
`from_pretrained` would build from the same config, on the meta device.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..models.offload import device_of, reading
from ..models.quantized import MARKS, is_unpacked, remove_marks
from ..models.running import undisturbed
from .entry import ENTRY
from .layers import without_idle_layers
from .skeleton import build_skeleton, describe, nested_configs, read_back, sizes, tensors
from .spec import LayoutSpec, apply_spec
from .stock import find_stock_config

NOTICE = (
    "This model was pruned; its layers have widths of their own, listed here. To load it: `pip install hf_subprune`, "
    "then `import hf_subprune` before `from_pretrained`; or, where code lies beside the weights, "
    "trust_remote_code=True. Never pass ignore_mismatched_sizes=True without either: that replaces the pruned layers "
    "by random ones."
)


@dataclass(frozen=True, eq=False)
class Layout:
    """How a pruned model was made ready to be saved.

    Args:
        kind: `"stock"`: `model.config` says all widths, nothing is needed to load it. `"ragged"`: the config carries
            an entry with the widths, which hf_subprune, or the remote code saved beside the weights, reads.
        reason: Why this layout, in words for the report.
        undo: Puts `model.config` and the configs inside the model back as they were, and layers that are gone.
    """

    kind: str
    reason: str
    undo: Callable[[], None]


def choose_layout(model: PreTrainedModel, layout: str = "auto", *, inputs: Mapping[str, Any]) -> Layout:
    """Make `model.config` describe the widths that `model` has, and prove that they load.

    In a stock layout, layers that no longer add anything are taken out of the model.

    The proof: the class is built anew from the config as it reads back from disk, on the meta device; it takes the
    tensors of `model` (no copy is made) and must give the same outputs on `inputs`, with difference 0.0. Where a model
    spreads over several devices only shapes and attributes are compared, and `reason` says so.

    Args:
        model: A pruned model. Only its configs change, and idle layers go; on an error nothing does.
        layout: `"stock"`, `"ragged"`, or `"auto"`: stock if the config can say the widths, else ragged.
        inputs: Keyword arguments of a forward, on the model's device.

    Raises:
        ValueError: Unknown `layout`; `"stock"` where the config cannot say the widths; a quantized model; a model
            that its class, widths and weights do not rebuild.
    """
    if layout not in ("auto", "stock", "ragged"):
        raise ValueError(f"layout must be 'auto', 'stock' or 'ragged', got {layout!r}")
    restore = [_snapshot(model)]

    def undo() -> None:
        for one in reversed(restore):
            one()

    try:
        _drop_entries(model)
        chosen = _follow_choices(model)
        shortened = None if layout == "ragged" else without_idle_layers(model, inputs)
        if shortened is not None:
            restore.append(shortened.undo)
            adopt(model, shortened.config)
        spec = describe(model)
        if not spec and shortened is None:
            kind, reason = "stock", "the config already says every width" + _prove(model, spec, inputs)
        elif layout == "ragged":
            kind, reason = "ragged", "asked for"
        else:
            kind, reason = _try_stock(model, spec, inputs, required=layout == "stock")
            if kind == "stock" and shortened is not None:
                reason = ", ".join(filter(None, (shortened.reason, reason)))
        if kind == "ragged":
            undo()
            _drop_entries(model)
            _follow_choices(model)
            spec = describe(model)
            write_ragged(model, spec)
            reason += _prove(model, spec, inputs)
    except BaseException:
        undo()
        raise
    return Layout(kind, reason + chosen, undo)


def config_says(model: PreTrainedModel) -> bool:
    """Whether the config can say the widths that `model` has, by the shapes of its tensors: nothing is run."""
    undo = _snapshot(model)
    try:
        _drop_entries(model)
        spec = describe(model)
        return not spec or find_stock_config(type(model), model.config, spec, sizes(model, spec)).config is not None
    finally:
        undo()


def _follow_choices(model: PreTrainedModel) -> str:
    """Let configs name the variants that a model switched to since it was built, as BigBird does on short texts.

    Returns:
        What was changed, to be added to the reason; `""` if nothing.
    """
    changes = {}
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            for name, value in vars(part).items():
                if type(value) is str and vars(part.config).get(name, value) != value:
                    setattr(part.config, name, value)
                    changes[name] = value
    return "".join(f"; {name} is {value!r}, to which the model has switched" for name, value in changes.items())


def _try_stock(model: PreTrainedModel, spec: LayoutSpec, inputs: Mapping[str, Any], required: bool) -> tuple[str, str]:
    """Adopt a config that says the widths of `model` and proves to.

    Returns:
        `("stock", the values that say them)`, or `("ragged", why the config cannot)`.

    Raises:
        ValueError: It cannot, and it is `required`.
    """
    stock = find_stock_config(type(model), model.config, spec, sizes(model, spec))
    problem = stock.reason
    if stock.config is not None:
        adopt(model, stock.config)
        try:
            return "stock", stock.reason + _prove(model, LayoutSpec(), inputs)
        except ValueError as error:
            problem = f"with {stock.reason}, {error}"
    if required:
        raise ValueError(f"layout='stock' is not possible for {type(model).__name__}: {problem}. {stock.advice}")
    return "ragged", problem


def write_ragged(model: PreTrainedModel, spec: LayoutSpec) -> None:
    """Store `spec` in `model.config`: the one place that decides how ragged widths are written.

    Each config inside (text and vision of CLIP) carries the widths of its own part too, because a part that is loaded
    alone reads that config only. Resized buffers become persistent: they cannot be rebuilt from the config.
    """
    setattr(model.config, ENTRY, entry(spec))
    parts = {id(config): config for path, config in nested_configs(model.config) if path}
    for path, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and id(module.config) in parts and (own := spec.restricted_to(path)):
            setattr(module.config, ENTRY, entry(own))
    for name in spec.shapes:
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if leaf in module._buffers:
            module._non_persistent_buffers_set.discard(leaf)


def entry(spec: LayoutSpec) -> dict[str, Any]:
    """`spec` as it stands in config.json, with a notice for readers who have no hf_subprune."""
    return {
        "library": "hf_subprune",
        "install": "pip install hf_subprune",
        "notice": NOTICE,
        **spec.to_dict(),
    }


def adopt(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    """Set the values of `config` in every config that `model` holds, the copies inside its modules included."""
    built = dict(build_skeleton(type(model), config).named_modules())
    pairs = [(model.config, config)]
    pairs += [
        (module.config, built[path].config)
        for path, module in model.named_modules()
        if path in built and isinstance(getattr(module, "config", None), PreTrainedConfig)
    ]
    for mine, theirs in pairs:
        for (_, part), (_, wanted) in zip(nested_configs(mine), nested_configs(theirs), strict=True):
            for name, value in vars(wanted).items():
                if isinstance(value, (int, float, list)) and vars(part).get(name) != value:
                    setattr(part, name, value)


def _prove(model: PreTrainedModel, spec: LayoutSpec, inputs: Mapping[str, Any]) -> str:
    """Rebuild `model` from its config, `spec` and tensors and compare outputs on `inputs`.

    Returns:
        What remains unproven, to be added to the reason; `""` if nothing.

    Raises:
        ValueError: The rebuilt model lacks tensors, has others, or gives other outputs.
    """
    cannot = f"{type(model).__name__} cannot be stored: a model built from its config and pruned widths "
    rebuilt = build_skeleton(type(model), read_back(model.config))
    apply_spec(rebuilt, spec)
    mine, theirs = tensors(model), tensors(rebuilt)
    for name, tensor in mine.items():
        if name in theirs and theirs[name].shape != tensor.shape:
            shapes = f"{tuple(theirs[name].shape)} instead of {tuple(tensor.shape)}"
            raise ValueError(f"{cannot}has {name} of shape {shapes}")
    devices = {device_of(tensor) for tensor in mine.values()}
    if len(devices) > 1:
        return "; shapes were compared, outputs were not, because the model spans several devices"
    for name, tensor in theirs.items():
        path, _, leaf = name.rpartition(".")
        module = rebuilt.get_submodule(path)
        held: dict[str, Any] = module._parameters if leaf in module._parameters else module._buffers
        # What this model was built without, such as a pooler, must not be the reason why the forward fails.
        held[leaf] = mine.get(name, torch.zeros_like(tensor, device=next(iter(devices))))
    with reading(rebuilt):
        gap = difference(outputs(model, inputs), outputs(rebuilt, inputs))
    if gap != 0.0:
        raise ValueError(
            f"{cannot}gives outputs that differ by {gap:.3g}. Something besides widths was changed (a forward "
            "hook, a replaced module, an attribute that is not an integer); undo it before pruning"
        )
    return ""


def outputs(model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Tensors that a forward in evaluation mode returns, by name."""
    with undisturbed(model), torch.no_grad():
        torch.manual_seed(0)
        return dict(_flatten("", model(**inputs)))


def _flatten(name: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, (Mapping, tuple, list)):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, item in items:
            yield from _flatten(f"{name}.{key}", item)


def difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """Largest absolute difference over the tensors of `first`; NaN equals NaN."""
    largest = 0.0
    for name, tensor in first.items():
        other = second.get(name)
        if other is None or other.shape != tensor.shape:
            return float("inf")
        if not torch.equal(tensor, other):
            gap = (tensor.double() - other.double()).abs()
            gap[tensor.isnan() & other.isnan()] = 0.0
            largest = max(largest, gap.nan_to_num(nan=float("inf")).max().item())
    return largest


def _snapshot(model: PreTrainedModel) -> Callable[[], None]:
    """Remember configs, marks of a quantizer and which buffers are persistent; the result puts them back."""
    marks = {name: vars(model)[name] for name in MARKS if name in vars(model)}
    configs = {id(part): part for config in _configs(model) for _, part in nested_configs(config)}
    values = [(config, dict(vars(config))) for config in configs.values()]
    buffers = [(module, set(module._non_persistent_buffers_set)) for module in model.modules()]

    def undo() -> None:
        vars(model).update(marks)
        for config, before in values:
            vars(config).clear()
            vars(config).update(before)
        for module, names in buffers:
            module._non_persistent_buffers_set = set(names)

    return undo


def _drop_entries(model: PreTrainedModel) -> None:
    """Forget the widths of an earlier pruning, before they are described anew, and that weights were unpacked."""
    for config in _configs(model):
        for _, part in nested_configs(config):
            vars(part).pop(ENTRY, None)
            old = vars(part).get("quantization_config")
            method = old.get("quant_method") if isinstance(old, Mapping) else getattr(old, "quant_method", None)
            if old is not None and not is_unpacked(model, method):
                raise ValueError(
                    f"{type(model).__name__} is quantized with {getattr(method, 'value', method)!r}: prune the model "
                    "before it is quantized, then quantize the pruned one"
                )
            vars(part).pop("quantization_config", None)
    remove_marks(model)


def _configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """Every config object that `model` or a module of it reads, each once."""
    held = [vars(module).get("config") for module in model.modules()]
    return list({id(config): config for config in held if isinstance(config, PreTrainedConfig)}.values())
