"""A model as a GGUF file, which llama.cpp and all that is built on it run.

Stock models are written under the name that llama.cpp has for their architecture. Ragged ones, if they are the network
of Llama, as `deci`, whose heads, key/value heads and neurons are listed by layer. A sublayer that is gone is a zero in
these lists, but for one thing: `deci` ends a layer without neurons before what its attention adds, so that an MLP
which is gone beside attention that stays is written as a few neurons of zeros. Layers that add nothing are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..storage.entry import listed
from .gguf_tokens import add_tokenizer, add_tokenizer_of
from .llama_form import (
    LAYERS,
    LayerWidths,
    bias_left,
    check_llama,
    check_positions,
    frequency_factors,
    head_size,
    layer_widths,
    rope_parameters,
)

if TYPE_CHECKING:
    from gguf import GGUFWriter

RAGGED = "deci"
"""The architecture of llama.cpp whose layers have widths of their own."""

_LLAMA = "llama"
_OWN_NAMES = {"qwen2": "qwen2", "qwen3": "qwen3"}
"""`model_type` of models whose stock layout is written under a name of its own, with q and k as they are."""

_ROUNDED = 32
"""Rows of that many weights, or multiples, can be quantized; so many zeros stand for an MLP that is gone."""


@dataclass(frozen=True)
class _Plan:
    """How a model is written.

    Args:
        name: Of the architecture in llama.cpp.
        layers: Of the model, by number, that are written, with their widths.
        size: Of a head.
        permuted: Whether llama.cpp rotates neighbouring entries of a head, where Transformers rotates halves.
    """

    name: str
    layers: dict[int, LayerWidths]
    size: int
    permuted: bool


def write_gguf(model: PreTrainedModel, source: str | Path, out: str | Path, like: str | Path | None = None) -> None:
    """Write a causal language model into one GGUF file; weights keep their dtype.

    Args:
        model: On any device.
        source: Where it was loaded from, with its tokenizer.
        out: The file.
        like: A GGUF file of the original model, whose tokenizer, chat template and license are taken over.

    Raises:
        ImportError: gguf is not installed.
        ValueError: llama.cpp has no form for this model or its tokenizer; the message says why. Nothing is written.
    """
    import gguf

    plan = _planned(model)
    architecture = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[plan.name]
    names = gguf.get_tensor_name_map(architecture, len(plan.layers))
    rows = model.get_input_embeddings().get_parameter("weight").shape[0]
    writer = gguf.GGUFWriter(out, plan.name)
    _add_description(writer, model, source)
    _add_sizes(writer, model, plan, rows)
    if like is None:
        add_tokenizer(writer, source, rows)
    else:
        add_tokenizer_of(writer, gguf.GGUFReader(like), rows)
    for name, tensor in _written(model, plan):
        written = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if written is None:
            raise ValueError(f"{name} has no name in llama.cpp's {plan.name}")
        _add_tensor(writer, written, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _planned(model: PreTrainedModel) -> _Plan:
    """How a model is written.

    Raises:
        ValueError: llama.cpp has no form for it that is known here.
    """
    own = _OWN_NAMES.get(model.config.model_type)
    name = type(model).__name__
    if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise ValueError(f"{name} cannot be exported to GGUF: only causal language models are")
    entry = listed(model.config)
    try:
        if entry is None and own is not None:
            return _own(model, own)
        check_llama(model)
    except ValueError as error:
        if entry is None:
            advice = "The folder is an ordinary one: llama.cpp's convert_hf_to_gguf.py may know this architecture"
        else:
            advice = "Widths that differ by layer take the network of Llama; prune with layout='stock' instead"
        raise ValueError(f"{name} cannot be exported to GGUF: {error}. {advice}.") from error
    widths = dict(enumerate(layer_widths(model)))
    if len(set(widths.values())) == 1 and widths[0].heads and widths[0].neurons:
        return _Plan(_LLAMA, widths, head_size(model), permuted=True)
    layers = {number: _as_deci(model, number, one) for number, one in widths.items()}
    return _Plan(RAGGED, {n: one for n, one in layers.items() if one.heads or one.neurons}, head_size(model), True)


def _own(model: PreTrainedModel, name: str) -> _Plan:
    check_positions(model.config)
    if frequency_factors(model) is not None:
        kind = rope_parameters(model.config)["rope_type"]
        raise ValueError(f"rope_type is {kind!r}, which llama.cpp's {name} has not")
    return _Plan(name, dict(enumerate(layer_widths(model))), head_size(model), permuted=False)


def _as_deci(model: PreTrainedModel, number: int, widths: LayerWidths) -> LayerWidths:
    """With an MLP of zeros where one that is gone stands beside attention, or leaves a bias.

    Raises:
        ValueError: attention that is gone leaves a bias.
    """
    if not widths.heads and bias_left(model, number, "self_attn.o_proj"):
        raise ValueError(f"the attention of layer {number} is gone but for a bias, which llama.cpp has no place for")
    if not widths.neurons and (widths.heads or bias_left(model, number, "mlp.down_proj")):
        return replace(widths, neurons=_ROUNDED)
    return widths


def _add_description(writer: GGUFWriter, model: PreTrainedModel, source: str | Path) -> None:
    """Name, license, languages and sampling, as the card and the generation config beside the model say them."""
    import gguf

    folder = Path(source)
    described = gguf.Metadata.load(
        model_path=folder if folder.is_dir() else None,
        model_name=folder.name,
        total_params=model.num_parameters(),
    )
    described.set_gguf_meta_model(writer)
    writer.add_type("model")
    writer.add_string("general.exported_by", f"hf_subprune {version('hf_subprune')}")


def _add_sizes(writer: GGUFWriter, model: PreTrainedModel, plan: _Plan, rows: int) -> None:
    config, widths = model.config, list(plan.layers.values())
    writer.add_block_count(len(widths))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_vocab_size(rows)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(plan.size)
    writer.add_value_length(plan.size)
    writer.add_rope_dimension_count(plan.size)
    writer.add_rope_freq_base(rope_parameters(config)["rope_theta"])
    if plan.name == RAGGED:
        writer.add_head_count([one.heads for one in widths])
        writer.add_head_count_kv([one.groups for one in widths])
        writer.add_feed_forward_length([one.neurons for one in widths])
    else:
        writer.add_head_count(widths[0].heads)
        writer.add_head_count_kv(widths[0].groups)
        writer.add_feed_forward_length(widths[0].neurons)
    writer.add_file_type(_file_type(model.dtype))


def _file_type(dtype: torch.dtype) -> int:
    from gguf import LlamaFileType

    types = {torch.float16: LlamaFileType.MOSTLY_F16, torch.bfloat16: LlamaFileType.MOSTLY_BF16}
    return int(types.get(dtype, LlamaFileType.ALL_F32))


def _written(model: PreTrainedModel, plan: _Plan) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors under the names of Transformers, with layers numbered anew, in llama.cpp's order of entries."""
    if (factors := frequency_factors(model)) is not None:
        yield "rope_freqs.weight", factors
    numbers = {number: new for new, number in enumerate(plan.layers)}
    head = model.get_output_embeddings()
    tied = head is None or head.weight is model.get_input_embeddings().weight
    for name, tensor in model.named_parameters(remove_duplicate=False):
        if name.startswith(f"{LAYERS}."):
            number, _, rest = name.removeprefix(f"{LAYERS}.").partition(".")
            if int(number) in numbers:
                written = _of_layer(rest, tensor, plan.layers[int(number)], plan)
                if written is not None:
                    yield f"{LAYERS}.{numbers[int(number)]}.{rest}", written
        elif not (tied and name.startswith("lm_head.")):
            yield name, tensor


def _of_layer(name: str, tensor: torch.Tensor, widths: LayerWidths, plan: _Plan) -> torch.Tensor | None:
    """One tensor of a layer as it is written; `None` if its sublayer is not."""
    attention = name.startswith(("self_attn.", "input_layernorm."))
    if not (widths.heads if attention else widths.neurons):
        return None
    if plan.permuted and name.startswith("self_attn.q_proj."):
        return _permuted(tensor, widths.heads)
    if plan.permuted and name.startswith("self_attn.k_proj."):
        return _permuted(tensor, widths.groups)
    if tensor.numel():
        return tensor
    return tensor.new_zeros([size or widths.neurons for size in tensor.shape])


def _permuted(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head with halves interleaved: those that are rotated together become neighbours."""
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)


def _add_tensor(writer: GGUFWriter, name: str, tensor: torch.Tensor) -> None:
    """Matrices in their dtype; vectors in float32, as llama.cpp adds and multiplies them."""
    import gguf

    values = tensor.detach().cpu()
    if values.dim() < 2 or values.dtype == torch.float32:
        writer.add_tensor(name, values.float().contiguous().numpy())
    elif values.dtype == torch.bfloat16:
        kind = gguf.GGMLQuantizationType.BF16
        writer.add_tensor(name, values.contiguous().view(torch.uint8).numpy(), raw_dtype=kind)
    else:
        writer.add_tensor(name, values.half().contiguous().numpy())
