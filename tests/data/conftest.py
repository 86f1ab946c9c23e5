"""Small models and a tokenizer of the words of `small_texts`, made once a file."""

import pytest

# Imported where it is needed: see the conftest above.


@pytest.fixture(scope="module")
def bert():
    from small_texts import make_bert

    return make_bert()


@pytest.fixture(scope="module")
def tokenizer():
    from small_texts import make_tokenizer

    return make_tokenizer()


@pytest.fixture(scope="module")
def whisper_config():
    from transformers import WhisperConfig

    return WhisperConfig(
        vocab_size=43,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        num_mel_bins=8,
        max_target_positions=96,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        begin_suppress_tokens=None,
        suppress_tokens=None,
    )


@pytest.fixture(scope="module")
def wav2vec2():
    from small_texts import TEXT_MODEL
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    return Wav2Vec2Model(
        Wav2Vec2Config(
            **TEXT_MODEL, conv_dim=(8, 8), conv_kernel=(10, 3), conv_stride=(5, 2), num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2, num_feat_extract_layers=2, apply_spec_augment=False,
        )
    ).eval()  # fmt: skip
