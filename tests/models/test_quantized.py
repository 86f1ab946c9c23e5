"""Models that a quantizer loaded: those whose weights it unpacked are pruned as any other."""

import pytest
import torch
from batches import ready_batches
from same import assert_same_weights
from tiny import tiny
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.quantization_config import GgufConfig

from hf_subprune import PruneConfig, prune, prune_sizes
from hf_subprune.models.quantized import MARKS
from hf_subprune.models.session import check_prunable

gguf = pytest.importorskip("gguf")
CONFIG = PruneConfig(keep=0.7, samples=12, held_out=4, batch_size=4)


def write_gguf(model, path):
    """A Llama as llama.cpp stores it, in float32."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def unpacked(tmp_path) -> PreTrainedModel:
    """A model that was read from a GGUF file."""
    write_gguf(tiny("llama"), tmp_path / "tiny.gguf")
    return AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)


def marks(model):
    return {name: vars(model).get(name) for name in MARKS}


@pytest.mark.parametrize("layout", ["stock", "ragged"])
def test_a_model_of_a_gguf_file_is_pruned_and_saved_as_any_other(unpacked, tmp_path, layout):
    assert unpacked.is_quantized and unpacked.config.quantization_config.quant_method == "gguf"
    whole = unpacked.num_parameters()
    report = prune(unpacked, ready_batches(unpacked), {**CONFIG.to_dict(), "layout": layout})
    assert report.layout == layout and report.parameters.before == whole
    unpacked.save_pretrained(tmp_path / "pruned")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    assert again.num_parameters() < whole
    assert_same_weights(again, unpacked)
    again.half()


def test_sizes_of_a_gguf_file_are_saved_one_by_one_and_leave_its_marks(unpacked, tmp_path):
    before, described = marks(unpacked), dict(vars(unpacked.config))
    for number, _ in enumerate(prune_sizes(unpacked, ready_batches(unpacked), [CONFIG])):
        unpacked.save_pretrained(tmp_path / str(number))
        assert_same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / str(number)), unpacked)
    assert marks(unpacked) == before and vars(unpacked.config) == described


def test_a_failure_leaves_the_marks_too(unpacked):
    before = marks(unpacked)
    with pytest.raises(ValueError, match="layout='stock' is not possible"):
        prune(
            unpacked,
            ready_batches(unpacked),
            {**CONFIG.to_dict(), "layout": "stock", "budget": "uniform"} | {"exclude": ["model.layers.0.*"]},
        )
    assert marks(unpacked) == before


def test_weights_that_stayed_packed_are_refused():
    model = tiny("llama")
    model.is_quantized, model.quantization_method = True, GgufConfig().quant_method
    check_prunable(model)
    layer = model.model.layers[0].mlp.down_proj
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM is quantized \(gguf\)"):
        check_prunable(model)
