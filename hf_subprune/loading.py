"""Loading ragged models with plain `from_pretrained`: hf_subprune joins in where transformers lets quantizers join in.

Importing this module registers `QUANT_METHOD`; after `import hf_subprune`, the import of Transformers' models does.
`from_pretrained` then shapes the model that the config builds to the stored widths, before it reads weights, and the
result is an ordinary model. So does `from_config`, whose weights are random.

It is imported in the middle of imports of Transformers: what is imported above, they have finished with; the rest is
imported when a model is loaded.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import transformers
from packaging.version import Version
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.modeling_utils import PreTrainedModel, load_state_dict
from transformers.quantizers import HfQuantizer, auto
from transformers.utils.quantization_config import QuantizationConfigMixin

from .storage.method import QUANT_METHOD

if TYPE_CHECKING:
    from .storage.spec import LayoutSpec

# With a quantizer, Transformers before 5.23 loads tensors of any shape, so that a head of another size is the old one.
_TAKES_ANY_SHAPE = Version(transformers.__version__) < Version("5.23")


class SubpruneConfig(QuantizationConfigMixin):
    """The widths of a ragged model, as transformers reads them from config.json.

    Users need it only to quantize a ragged model while it loads, which takes two quantizers where `from_pretrained`
    takes one: `quantization_config=SubpruneConfig(then=BitsAndBytesConfig(...))`. Stock models take any directly.

    Args:
        then: How to quantize the pruned model.
        spec: The widths; those of the checkpoint if None.
        stored: How the weights in the checkpoint already are quantized, if they are.
    """

    def __init__(
        self,
        then: QuantizationConfigMixin | None = None,
        *,
        spec: LayoutSpec | None = None,
        stored: QuantizationConfigMixin | None = None,
    ):
        if then is not None and not isinstance(then, QuantizationConfigMixin):
            raise TypeError(f"then must be a quantization config such as BitsAndBytesConfig(...), got {then!r}")
        self.quant_method: Any = QUANT_METHOD
        self.then = then
        self.spec = spec
        self.stored = stored

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Read the entry of a config.json.

        Raises:
            ValueError: The entry is damaged or of a later format.
        """
        from .storage.spec import LayoutSpec

        stored = config_dict.get("then")
        if stored is not None and (not isinstance(stored, dict) or stored.get("quant_method") == QUANT_METHOD):
            raise ValueError(
                f"`then` of this model's subprune entry is {reprlib.repr(stored)}, not how its weights are quantized: "
                "restore config.json as it was saved"
            )
        config = cls(
            spec=LayoutSpec.from_dict(config_dict),
            stored=None if stored is None else auto.AutoQuantizationConfig.from_dict(stored),
        )
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """The entry of config.json."""
        from .storage.layout import entry
        from .storage.spec import LayoutSpec

        inner = self.stored or self.then
        return entry(self.spec or LayoutSpec()) | ({} if inner is None else {"then": inner.to_dict()})

    def get_loading_attributes(self) -> dict[str, Any]:
        """What of a config passed to `from_pretrained` is set on the one read from the checkpoint."""
        return {} if self.then is None else {"then": self.then}


class _PrunedFirst(HfQuantizer):
    """Shapes the skeleton to the pruned widths before the quantizer that it is mixed with, if any, sees it."""

    def __init__(self, config: SubpruneConfig, pre_quantized: bool = True, **kwargs: Any):
        if config.spec is None or not pre_quantized:
            raise ValueError(
                "SubpruneConfig was passed, but this checkpoint has no pruned widths of its own (it is not pruned, or "
                "it has the stock layout): pass the quantization config inside `then` itself, or none"
            )
        if config.stored is not None and config.then is not None:
            raise ValueError(
                f"this checkpoint is already quantized ({type(config.stored).__name__}): load it without "
                f"SubpruneConfig(then={type(config.then).__name__}(...))"
            )
        self.spec = config.spec
        self.model: PreTrainedModel | None = None
        inner = config.stored or config.then
        super().__init__(inner or config, pre_quantized=inner is None or config.stored is not None, **kwargs)

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Iterable[str] | None = None, **kwargs: Any
    ) -> None:
        from .storage.spec import apply_spec

        self.files, self.model = list(checkpoint_files or ()), model
        self.applied = apply_spec(model, self.spec)
        super()._process_model_before_weight_loading(model, checkpoint_files=checkpoint_files, **kwargs)

    def update_weight_conversions(self, weight_conversions: list, *model: PreTrainedModel) -> list:
        """Called once it is known how names in files become names in the model: the time to compare shapes.

        Transformers passes the model from 5.22 on.
        """
        conversions = super().update_weight_conversions(weight_conversions, *model)
        if self.model is not None:
            self._check_files(self.model, conversions)
            self.model = None  # saving calls this as well
        return conversions

    def _check_files(self, model: PreTrainedModel, conversions: list) -> None:
        """Compare the shapes in the checkpoint with those of the model."""
        renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
        converters = [conversion for conversion in conversions if isinstance(conversion, WeightConverter)]
        built = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        listed = {*self.spec.shapes, *self.applied.shapes}
        for file in self.files:
            for key, tensor in load_state_dict(file, map_location="meta").items():
                name, merged = rename_source_key(key, renamings, converters, model.base_model_prefix, built)
                compared = _TAKES_ANY_SHAPE or not listed.isdisjoint((key, name))
                if merged is None and name in built and compared:
                    self._check_shape(file, key, tuple(tensor.shape), built[name])

    def _check_shape(self, file: str, name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
        """Refuse a checkpoint that does not have the widths of its config, whatever `ignore_mismatched_sizes` says."""
        if shape != expected:
            raise ValueError(
                f"{file}: {name} has shape {shape}, but the config.json beside it says {expected}: they were not "
                "saved together. Take both from the same save_pretrained"
                + (", or Transformers 5.23 for a new head" if _TAKES_ANY_SHAPE else "")
            )


class SubpruneQuantizer(_PrunedFirst):
    """What `from_pretrained` calls for a ragged model. Quantizes nothing unless the config says what to do `then`."""

    def __new__(cls, config: SubpruneConfig, **kwargs: Any) -> Any:
        inner = config.stored or config.then
        if inner is None:
            return super().__new__(cls)
        quantizer = type(auto.AutoHfQuantizer.from_config(inner, pre_quantized=config.stored is not None))
        return type(f"Pruned{quantizer.__name__}", (_PrunedThenQuantized, quantizer), {})(config, **kwargs)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        from .models.quantized import remove_marks
        from .storage.layout import write_ragged

        remove_marks(model)
        write_ragged(model, self.applied)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


class _PrunedThenQuantized(_PrunedFirst):
    """Mixed with the quantizer that `then` names; the model stays marked as quantized."""

    def _check_shape(self, *args: Any) -> None:
        if not self.pre_quantized:  # quantized weights are packed into other shapes
            super()._check_shape(*args)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        from .storage.layout import write_ragged

        model = super()._process_model_after_weight_loading(model, **kwargs) or model
        write_ragged(model, self.applied)
        model.config.quantization_config["then"] = self.quantization_config.to_dict()
        return model


def _from_config(cls: Any, config: Any, **kwargs: Any) -> PreTrainedModel:
    """What `from_config` calls: the model that a config describes, with random weights, in its pruned widths."""
    model = _build(cls, config, **kwargs)
    listed = getattr(config, "quantization_config", None)
    listed = listed.to_dict() if isinstance(listed, SubpruneConfig) else listed
    if isinstance(listed, dict) and listed.get("quant_method") == QUANT_METHOD:
        from .storage.layout import write_ragged
        from .storage.spec import LayoutSpec, apply_spec

        write_ragged(model, apply_spec(model, LayoutSpec.from_dict(listed)))
    return model


_build = vars(PreTrainedModel)["_from_config"].__func__
_build = getattr(_build, "replaced", _build)  # after a reload, what is there is what an earlier import put there
vars(_from_config)["replaced"] = _build


def register() -> None:
    """Make `from_pretrained` and `from_config` know ragged models.

    Done on import; once more, after a reload, replaces the classes.
    """
    # Transformers gives quantizers no part in `from_config`, which would build the unpruned model without a word.
    PreTrainedModel._from_config = classmethod(_from_config)  # type: ignore[method-assign, assignment]
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.pop(QUANT_METHOD, None)
    auto.AUTO_QUANTIZER_MAPPING.pop(QUANT_METHOD, None)
    auto.register_quantization_config(QUANT_METHOD)(SubpruneConfig)
    auto.register_quantizer(QUANT_METHOD)(SubpruneQuantizer)
    # Lets `then` of a config that the user passes reach the config that is read from the checkpoint.
    others = [known for known in auto.LOADING_ATTRIBUTES_CONFIG_TYPES if known.__name__ != SubpruneConfig.__name__]
    vars(auto)["LOADING_ATTRIBUTES_CONFIG_TYPES"] = (*others, SubpruneConfig)


register()
