"""Tiny randomly initialised models of many families, for tests; no network."""

import torch
import transformers
from transformers import PreTrainedModel

TEXT = {"vocab_size": 120, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
# Sizes of one family differ from one another, so that an attribute or a dimension cannot be taken for another one.
DECODER = {
    **TEXT,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
ENCODER = {
    **TEXT,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
VISION = {
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
ENCODER_DECODER = {
    **TEXT,
    "d_model": 48,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 6,
    "encoder_ffn_dim": 56,
    "decoder_ffn_dim": 64,
    "decoder_start_token_id": 2,
    "max_position_embeddings": 64,
}

FAMILIES: dict[str, tuple[str, dict]] = {
    "bert": ("BertForSequenceClassification", ENCODER),
    "roberta": ("RobertaForMaskedLM", ENCODER),
    "electra": ("ElectraForSequenceClassification", {**ENCODER, "embedding_size": 32}),
    "mpnet": ("MPNetModel", ENCODER),
    "deberta-v2": (
        "DebertaV2ForSequenceClassification",
        {**ENCODER, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
    ),
    "deberta-v3": (
        "DebertaV2ForSequenceClassification",
        {**ENCODER, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}
        | {"share_att_key": True, "norm_rel_ebd": "layer_norm"},
    ),
    "albert": ("AlbertForMaskedLM", {**ENCODER, "embedding_size": 24}),
    "modernbert": (
        "ModernBertForMaskedLM",
        {**ENCODER, "cls_token_id": 1, "sep_token_id": 2, "global_attn_every_n_layers": 2, "local_attention": 4},
    ),
    "distilbert": (
        "DistilBertForSequenceClassification",
        {**TEXT, "dim": 48, "hidden_dim": 56, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64},
    ),
    "gpt2": ("GPT2LMHeadModel", {**TEXT, "n_embd": 48, "n_inner": 56, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "gpt_neo": (
        "GPTNeoForCausalLM",
        {**TEXT, "hidden_size": 48, "intermediate_size": 56, "num_layers": 2, "num_heads": 4, "window_size": 4}
        | {"attention_types": [[["global", "local"], 1]]},
    ),
    "gptj": ("GPTJForCausalLM", {**TEXT, "n_embd": 48, "n_inner": 56, "n_layer": 2, "n_head": 4, "rotary_dim": 4}),
    "gpt_neox": ("GPTNeoXForCausalLM", ENCODER),
    "opt": (
        "OPTForCausalLM",
        {**TEXT, "hidden_size": 48, "ffn_dim": 56, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"max_position_embeddings": 64, "word_embed_proj_dim": 40},
    ),
    "bloom": ("BloomForCausalLM", {**TEXT, "hidden_size": 48, "n_layer": 2, "n_head": 4}),
    "falcon": (
        "FalconForCausalLM",
        {**TEXT, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "num_kv_heads": 3}
        | {"new_decoder_architecture": True},
    ),
    "falcon_mqa": (
        "FalconForCausalLM",
        {**TEXT, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "multi_query": True}
        | {"new_decoder_architecture": False},
    ),
    "llama": ("LlamaForCausalLM", DECODER),
    "llama_mqa": ("LlamaForCausalLM", {**DECODER, "num_key_value_heads": 1}),
    "mistral": ("MistralForCausalLM", {**DECODER, "sliding_window": 4}),
    "qwen2": ("Qwen2ForCausalLM", DECODER),
    "qwen3": ("Qwen3ForCausalLM", DECODER),
    "gemma2": ("Gemma2ForCausalLM", {**DECODER, "sliding_window": 4, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3ForCausalLM", {**DECODER, "sliding_window": 4, "query_pre_attn_scalar": 8}),
    "phi": ("PhiForCausalLM", {**ENCODER, "num_key_value_heads": 2}),
    "phi3": ("Phi3ForCausalLM", DECODER),
    "olmo2": ("Olmo2ForCausalLM", {key: value for key, value in DECODER.items() if key != "head_dim"}),
    "vit": ("ViTForImageClassification", VISION),
    "dinov2": ("Dinov2Model", {key: VISION[key] for key in VISION if key != "intermediate_size"}),
    "swin": (
        "SwinForImageClassification",
        {"image_size": 32, "patch_size": 2, "embed_dim": 24, "depths": [2, 2], "num_heads": [3, 4], "window_size": 4},
    ),
    "resnet": (
        "ResNetForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [16, 24], "depths": [2, 1], "layer_type": "bottleneck"},
    ),
    "mobilenet_v2": ("MobileNetV2ForImageClassification", {"depth_multiplier": 0.25, "image_size": 32}),
    "clip": ("CLIPModel", {"text_config": ENCODER, "vision_config": VISION, "projection_dim": 40}),
    "siglip": ("SiglipModel", {"text_config": ENCODER, "vision_config": VISION}),
    "wav2vec2": (
        "Wav2Vec2ForCTC",
        {**ENCODER, "conv_dim": [32, 32], "conv_stride": [5, 4], "conv_kernel": [10, 4]}
        | {"num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2},
    ),
    "t5": (
        "T5ForConditionalGeneration",
        {**TEXT, "d_model": 48, "d_kv": 8, "d_ff": 56, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
    ),
    "bart": ("BartForConditionalGeneration", ENCODER_DECODER),
    "marian": ("MarianMTModel", ENCODER_DECODER),
    "whisper": (
        "WhisperForConditionalGeneration",
        {key: value for key, value in ENCODER_DECODER.items() if key != "max_position_embeddings"}
        | {"num_mel_bins": 16, "max_source_positions": 20, "max_target_positions": 64, "suppress_tokens": None}
        | {"begin_suppress_tokens": None},
    ),
}
"""Model class and config overrides by family."""


def tiny(family: str, seed: int = 0, **overrides) -> PreTrainedModel:
    """A tiny model of `family` in evaluation mode, in float32, with weights large enough for outputs to differ."""
    class_name, settings = FAMILIES[family]
    model_class = getattr(transformers, class_name)
    torch.manual_seed(seed)
    model = model_class(model_class.config_class(**{**settings, **overrides}))
    with torch.no_grad():
        for parameter in model.parameters():
            # Initial biases are zero and initial norms are one: a test that mixed them up would not notice.
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()
