"""The name of the ragged layout."""

QUANT_METHOD = "subprune (pip install hf_subprune)"
"""The name under which the widths of a ragged model stand in `config.quantization_config`.

Where hf_subprune is missing, this name is all of the entry that the messages of transformers show."""
