"""A tiny Whisper that hears a second, with its processor, and folders of sounds for it."""

import json
from pathlib import Path

import numpy as np
import soundfile
from tiny import tiny
from transformers import PreTrainedModel, WhisperFeatureExtractor, WhisperProcessor, WhisperTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

RATE = 16_000
SPECIAL = ["<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"]


def tiny_whisper(**overrides) -> PreTrainedModel:
    """Two layers a side, of 50 frames, for the tokens of `make_processor` and the times of every frame."""
    start = 256
    tokens = {
        "max_source_positions": 50,
        "vocab_size": start + 3 + 51,
        "pad_token_id": start,
        "bos_token_id": start,
        "eos_token_id": start,
    }
    model = tiny("whisper", **{**tokens, "decoder_start_token_id": start + 1, **overrides})
    told = {"no_timestamps_token_id": start + 2, "is_multilingual": False, "return_timestamps": False}
    told |= {"_from_model_config": False}  # else it is made anew when the model is saved
    for name, value in told.items():  # what only Whisper's has, `update` passes over
        setattr(model.generation_config, name, value)
    return model


def make_processor() -> WhisperProcessor:
    """Every byte of a text is a token."""
    vocabulary = {sign: number for number, sign in enumerate(bytes_to_unicode().values())}
    vocabulary |= {token: len(vocabulary) + number for number, token in enumerate(SPECIAL)}
    tokenizer = WhisperTokenizer(vocab=vocabulary, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[1:]})
    return WhisperProcessor(WhisperFeatureExtractor(feature_size=16, chunk_length=1), tokenizer)


def sounds(count: int, seed: int = 0, longest: int = RATE // 2) -> list[np.ndarray]:
    """Tones in noise, float32, of a quarter of the longest to the longest."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(longest // 4, longest, size=count)
    return [
        (np.sin(np.arange(length) * generator.uniform(0.05, 1)) + generator.normal(0, 0.1, length)).astype(np.float32)
        / 2
        for length in lengths
    ]


def write_sounds(folder: Path, waves: list[np.ndarray], texts: list[str] | None = None) -> Path:
    """Numbered wav files, and a `metadata.jsonl` where there are texts."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{number:03d}.wav" for number in range(len(waves))]
    for name, wave in zip(names, waves, strict=True):
        soundfile.write(folder / name, wave, RATE)
    if texts is not None:
        rows = ({"file_name": name, "text": text} for name, text in zip(names, texts, strict=True))
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
