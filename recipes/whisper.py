"""Prune Whisper on a few spoken sentences, and count the words that it gets wrong on others.

Takes a folder of sound files with a `metadata.jsonl` of `{"file_name": ..., "text": ...}`. Without one it lets `flite`
speak (`apt install flite`), in four voices, sentences that are put together from the lists below. The model may read
the transcripts of the sentences that it is calibrated on, or make its own (`--without-text`).

    pip install 'hf_subprune[evaluate,speech]'
    python recipes/whisper.py
    python recipes/whisper.py --model openai/whisper-base.en --speech recordings --keep 0.8 --save smaller
"""

import argparse
import itertools
import json
import random
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from tables import print_table
from transformers.utils import logging

from hf_subprune import PruneConfig, prune_sizes, save_pruned
from hf_subprune.data.datafiles import load_data, load_model
from hf_subprune.evaluation.tasks import Transcription, Trial
from hf_subprune.report.tables import example_table

VOICES = ("slt", "awb", "rms", "kal16")
PARTS = (
    ("Early in the morning", "After the long winter", "Without a word", "Last Thursday", "As everybody knows",
     "Near the old harbour", "Two hours later", "To our surprise", "In the middle of the concert", "Every summer",
     "Before the doors were closed", "According to the newspaper"),
    ("the gardener", "my younger brother", "a retired engineer", "the committee", "an impatient customer",
     "the second violin", "our neighbour's dog", "a group of students", "the night nurse", "the captain",
     "her grandmother", "a travelling salesman"),
    ("repaired", "forgot about", "photographed", "complained about", "carried away", "remembered", "looked for",
     "described", "sold", "admired", "painted", "borrowed"),
    ("the broken engine", "a basket of oranges", "three wooden chairs", "the railway timetable", "her blue umbrella",
     "a very expensive clock", "the letters from abroad", "an empty bottle", "the chemistry lesson",
     "a photograph of the bridge", "the price of bread", "a box of candles"),
    ("while it was raining.", "for the third time.", "without asking anyone.", "because nobody else would.",
     "and went home.", "in front of the library.", "before the storm began.", "with great care.",
     "on the way to the station.", "as if nothing had happened.", "until the lights went out.", "for a small fee."),
)  # fmt: skip
WAYS = {"default": {}, "each layer its own width": {"layout": "ragged"}}


def sentences(count: int) -> list[str]:
    """Different sentences, always the same ones."""
    every = list(itertools.product(*PARTS))
    return [" ".join((f"{first},", *rest)) for first, *rest in random.Random(0).sample(every, count)]


def speak(folder: Path, texts: Sequence[str]) -> None:
    """Let `flite` say every text into a file of the folder."""
    if shutil.which("flite") is None:
        raise SystemExit("There is no flite to speak: install it (apt install flite), or give a folder with --speech.")
    rows = []
    for number, (text, voice) in enumerate(zip(texts, itertools.cycle(VOICES))):
        rows.append({"file_name": f"{number:04d}.wav", "text": text})
        subprocess.run(["flite", "-voice", voice, "-t", text, "-o", folder / rows[-1]["file_name"]], check=True)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Prune in every way, from one calibration, print a table, and show what the models write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="openai/whisper-tiny.en", help="folder or Hub id of a Whisper")
    parser.add_argument("--speech", type=Path, help="folder of sound files with metadata.jsonl; flite speaks without")
    parser.add_argument("--samples", type=int, default=32, help="sentences to calibrate on, the first of the folder")
    parser.add_argument("--held-out", type=int, default=8, help="further sentences, to measure the drift on")
    parser.add_argument("--test", type=int, default=48, help="sentences behind those, to count word errors in")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.8, 0.7], help="parts of the blocks' parameters")
    parser.add_argument("--only", nargs="+", default=list(WAYS), choices=list(WAYS), help="ways to prune")
    parser.add_argument("--without-text", action="store_true", help="calibrate on what the model writes down itself")
    parser.add_argument("--save", type=Path, help="folder for the model of the first way and size")
    options = parser.parse_args(arguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    original, processor = load_model(options.model)
    calibration = options.samples + options.held_out
    common = {"samples": options.samples, "held_out": options.held_out}
    with tempfile.TemporaryDirectory() as scratch:
        if options.speech is None:
            speak(Path(scratch), sentences(calibration + options.test))
        data = list(load_data(str(options.speech or scratch)).take(calibration + options.test))
        given = [{"audio": row["audio"]} for row in data] if options.without_text else data
        trial = Trial(Transcription(data[calibration:], processor, dataset="sentences"), original)
        sizes = list(itertools.product(options.keep, options.only))
        configs = [PruneConfig(keep=keep, **WAYS[way], **common) for keep, way in sizes]
        pruned, rows = prune_sizes(original, given[:calibration], configs, processor), []
        for (keep, way), report in zip(sizes, pruned, strict=True):
            metrics = trial.score(original)  # which is as small as the report says now
            before, after, change = metrics[0].cells()
            row = {"keep": keep, "way": way, "MACs": report.macs.ratio, "layout": report.layout}
            rows.append({**row, "word errors before": before, "after": after, "change": change})
            if len(rows) == 1:
                shown = example_table(metrics)
                if options.save:
                    save_pruned(options.save, original, processor, report.with_metrics(metrics))
    print_table("Whisper pruned: word errors, with 95% intervals of the paired bootstrap", rows)
    Console().print(shown)
    return rows


if __name__ == "__main__":
    main()
