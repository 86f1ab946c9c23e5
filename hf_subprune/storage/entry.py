"""Where the widths of a ragged model stand in its config, and what stops those who cannot read them.

Only Python's own library is imported: this is needed in the middle of imports of Transformers.
"""

from collections.abc import Mapping
from typing import Any

ENTRY = "subprune"
"""Name of the entry of a config with the widths of the layers."""

WEIGHTS_ENTRY = "transformers_weights"
"""Entry of config.json by which Transformers goes when it looks for the weights, before anything is built.

Where it names no file, `from_pretrained` shows it in an error: the one place where words of ours can stand."""

NOT_READ = (
    "the layers of this model were pruned to widths of their own. pip install hf_subprune, and `import hf_subprune` "
    "before from_pretrained{}"
)
OR_TRUST = "; or pass trust_remote_code=True, for the code that lies beside the weights"

_OLD_METHOD = "subprune (pip install hf_subprune)"
"""Up to version 0.2 the widths stood in `quantization_config`, under this `quant_method`."""


def listed(config: Any) -> dict[str, Any] | None:
    """The entry of a config with the widths of its layers; `None` if it says them itself."""
    found = getattr(config, ENTRY, None)
    return found if isinstance(found, dict) else None


def readable(values: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json holds, as hf_subprune reads it: nothing stops it, and old entries stand where new ones do.

    Args:
        values: Of a config, with those of configs inside it; they are not changed.
    """
    read = {name: readable(value) if isinstance(value, dict) else value for name, value in values.items()}
    old = read.get("quantization_config")
    if isinstance(old, dict) and old.get("quant_method") == _OLD_METHOD:
        del read["quantization_config"]
        quantized = old.pop("then", None)
        if quantized is not None:
            read["quantization_config"] = quantized
        read[ENTRY] = {name: value for name, value in old.items() if name != "quant_method"}
    if isinstance(read.get(ENTRY), dict):
        read.pop(WEIGHTS_ENTRY, None)
    return read
