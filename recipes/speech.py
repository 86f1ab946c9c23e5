"""Prune an encoder-decoder speech model of Whisper's architecture, on sound alone.

Spoken tunes stand in for speech, so that nothing is downloaded: half a second of three tones, each one of eight
pitches, in noise. A tiny Whisper learns to write down the pitches; then it is pruned on waveforms without transcripts
(the decoder reads what the model itself generates), and the fraction of tones it gets right is compared.

    pip install 'hf_subprune[evaluate]'
    python recipes/speech.py
"""

import argparse
import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tables import print_table
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration, set_seed
from transformers.utils import logging

from hf_subprune import PruneConfig, prune
from hf_subprune.evaluation.metrics import as_metric, compare_scores

RATE, TONES, PITCHES = 16_000, 3, 8
START, END = PITCHES, PITCHES + 1  # tokens behind those of the pitches

SIZES = {
    "neurons": {"keep": {"mlp": 0.5}},
    "neurons and heads": {"keep": 0.5, "units": ("mlp", "attention")},
    "both, each layer its own": {"keep": 0.5, "units": ("mlp", "attention"), "layout": "ragged"},
}


def make_tunes(count: int, seed: int) -> tuple[list[np.ndarray], torch.Tensor]:
    """Waveforms of half a second, and the pitches in them, `(count, TONES)`."""
    generator = np.random.default_rng(seed)
    pitches = generator.integers(PITCHES, size=(count, TONES))
    time = np.arange(RATE // 2) / RATE
    which = np.minimum(time * 2 * TONES, TONES - 1).astype(int)  # the tone that sounds at each time
    hertz = 300 * 2 ** (pitches / 2)
    waves = np.sin(2 * np.pi * hertz[:, which] * time) + 0.8 * generator.standard_normal((count, len(time)))
    return list(waves.astype(np.float32)), torch.tensor(pitches)


def make_model() -> tuple[WhisperForConditionalGeneration, WhisperFeatureExtractor]:
    """Two layers a side, four heads and 256 neurons each, and what makes spectrograms of half a second."""
    set_seed(0)
    extractor = WhisperFeatureExtractor(feature_size=40, sampling_rate=RATE, chunk_length=0.5, hop_length=160)
    frames = RATE // 2 // 160
    config = WhisperConfig(
        vocab_size=PITCHES + 2,
        num_mel_bins=40,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=256,
        decoder_ffn_dim=256,
        max_source_positions=frames // 2,
        max_target_positions=TONES + 2,
        init_std=0.08,
        pad_token_id=END,
        bos_token_id=START,
        eos_token_id=END,
        decoder_start_token_id=START,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return WhisperForConditionalGeneration(config), extractor


def features(extractor: WhisperFeatureExtractor, waves: Sequence[np.ndarray]) -> torch.Tensor:
    """Spectrograms `(count, 40, frames)`."""
    return extractor(list(waves), sampling_rate=RATE, return_tensors="pt")["input_features"]


def train(model: WhisperForConditionalGeneration, inputs: torch.Tensor, pitches: torch.Tensor, steps: int) -> None:
    """AdamW on batches of 32 tunes; the labels end with the end token."""
    labels = torch.cat([pitches, torch.full((len(pitches), 1), END)], dim=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    model.train()
    for index in torch.randint(len(inputs), (steps, 32)):
        model(input_features=inputs[index], labels=labels[index]).loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


def transcribe(model: WhisperForConditionalGeneration, inputs: torch.Tensor) -> np.ndarray:
    """Pitches that the model writes down, greedily, `(count, TONES)`."""
    tokens = torch.full((len(inputs), 1), START)
    with torch.no_grad():
        for _ in range(TONES):
            logits = model(input_features=inputs, decoder_input_ids=tokens).logits[:, -1]
            tokens = torch.cat([tokens, logits.argmax(1, keepdim=True)], dim=1)
    return tokens[:, 1:].numpy()


def tones_right(predictions: np.ndarray, references: np.ndarray) -> float:
    """Fraction of the tones whose pitch was written down."""
    return float((predictions == references).mean())


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Train, prune in every way and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600, help="training steps of the original")
    parser.add_argument("--samples", type=int, default=256, help="tunes to calibrate on")
    parser.add_argument("--test", type=int, default=256, help="other tunes, to test on")
    options = parser.parse_args(arguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    original, extractor = make_model()
    waves, pitches = make_tunes(2048, seed=0)
    train(original, features(extractor, waves), pitches, options.steps)
    original.eval()

    unseen, truth = make_tunes(options.test, seed=1)
    inputs, references = features(extractor, unseen), truth.numpy()
    before = transcribe(original, inputs)
    common = {"samples": options.samples, "held_out": max(2, options.samples // 4)}
    rows = []
    for name, size in SIZES.items():
        model = copy.deepcopy(original)
        report = prune(model, waves, PruneConfig(**size, **common), extractor)
        after = transcribe(model, inputs)
        scores = compare_scores(as_metric(tones_right, "tones right"), before, after, references)["tones right"]
        low, high = scores.change_interval
        row = {"half of": name, "MACs": report.macs.ratio, "tones right before": scores.before, "after": scores.after}
        rows.append(row | {"change, 95%": f"{low:+.3f} to {high:+.3f}"})
    print_table("A Whisper that writes down tunes", rows)
    return rows


if __name__ == "__main__":
    main()
