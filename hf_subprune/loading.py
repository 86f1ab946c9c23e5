"""Loading ragged models with plain `from_pretrained`: hf_subprune joins in where transformers lets quantizers join in.

Importing this module (and `hf_subprune`, which does) registers the method `"subprune"`. `from_pretrained` then shapes
the model that the config builds to the stored widths, before it reads weights, and the result is an ordinary model.
"""

from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedModel
from transformers.modeling_utils import load_state_dict
from transformers.quantizers import HfQuantizer, auto
from transformers.utils.quantization_config import QuantizationConfigMixin

from .layout import QUANT_METHOD, entry, write_ragged
from .spec import LayoutSpec, apply_spec


class SubpruneConfig(QuantizationConfigMixin):
    """The widths of a ragged model, as transformers reads them from config.json.

    Args:
        spec: The widths. None in what a user passes to `from_pretrained` together with `then`: the widths are those
            of the checkpoint.
    """

    quant_method: Any = QUANT_METHOD

    def __init__(self, spec: LayoutSpec | None = None):
        self.spec = spec

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs):
        """Read the entry of a config.json.

        Raises:
            ValueError: The entry is damaged or of a later format.
        """
        config = cls(LayoutSpec.from_dict(config_dict))
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """The entry of config.json."""
        return entry(self.spec or LayoutSpec())


class SubpruneQuantizer(HfQuantizer):
    """Shapes a skeleton to the pruned widths; quantizes nothing.

    Raises:
        ValueError: The checkpoint carries no widths, or tensors of other shapes than its widths say.
    """

    quantization_config: SubpruneConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if self.quantization_config.spec is None or not self.pre_quantized:
            raise ValueError(
                "SubpruneConfig says how a pruned checkpoint is loaded, but this checkpoint is not pruned (or has the "
                "stock layout, which loads without it): leave out SubpruneConfig"
            )

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Iterable[str] | None = None, **kwargs: Any
    ) -> None:
        spec = self.quantization_config.spec or LayoutSpec()
        self.applied = apply_spec(model, spec)
        for file in checkpoint_files or ():
            stored = load_state_dict(file, map_location="meta")
            for widths in (spec, self.applied):
                _check_shapes(file, {name: tuple(tensor.shape) for name, tensor in stored.items()}, widths)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        """Make it an ordinary model again: `.half()`, `.float()` and Trainer refuse what is marked as quantized."""
        for name in ("is_quantized", "quantization_method", "hf_quantizer"):
            vars(model).pop(name, None)
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                vars(module.config).pop("_is_quantized", None)
        write_ragged(model, self.applied)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def _check_shapes(file: str, stored: dict[str, tuple[int, ...]], spec: LayoutSpec) -> None:
    """Refuse a checkpoint that does not have the widths of its config, whatever `ignore_mismatched_sizes` says."""
    for name, expected in spec.shapes.items():
        if stored.get(name, expected) != expected:
            raise ValueError(
                f"{file}: {name} has shape {stored[name]}, config.json beside it says {expected}: the two were not "
                "saved together. Take both from the same save_pretrained"
            )


def register() -> None:
    """Make `from_pretrained` know ragged models. Done on import; once more, after a reload, replaces the classes."""
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.pop(QUANT_METHOD, None)
    auto.AUTO_QUANTIZER_MAPPING.pop(QUANT_METHOD, None)
    auto.register_quantization_config(QUANT_METHOD)(SubpruneConfig)
    auto.register_quantizer(QUANT_METHOD)(SubpruneQuantizer)


register()
