"""Prune the demo's sentence encoder in two ways and write their model cards, reports and plots beside this file.

pip install 'hf_subprune[demo,plots,evaluate]'
python model_cards/render.py
"""

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

from hf_subprune import PruneConfig, prune
from hf_subprune.demo import demo_model_folder, docstrings
from hf_subprune.evaluation.tasks import EmbeddingDrift, Trial
from hf_subprune.report.card import CARD_NAME, INHERITED, base_card_data, write_card
from hf_subprune.report.records import HTML_NAME, PAGE_NAME, PLOT_FOLDER, REPORT_NAME
from hf_subprune.report.saving import save_pruned

BASE = "sentence-transformers/all-MiniLM-L6-v2"  # what the package holds a copy of
EXAMPLES = {
    "all-MiniLM-L6-v2-half-mlp": {"keep": {"mlp": 0.5}},
    "all-MiniLM-L6-v2-half-global": {"keep": 0.5, "layout": "ragged", "budget": "global"},
}


def main(arguments: Sequence[str] | None = None) -> list[Path]:
    """Render every example.

    Returns:
        Their folders.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write to")
    parser.add_argument("--samples", type=int, default=128, help="paragraphs to calibrate on")
    parser.add_argument("--unseen", type=int, default=512, help="other paragraphs, to test on")
    options = parser.parse_args(arguments)
    logging.disable_progress_bar()
    source = demo_model_folder()
    tokenizer = AutoTokenizer.from_pretrained(source)
    held_out = max(2, options.samples // 4)
    texts = docstrings(options.samples + held_out)
    unseen = [{"text": text} for text in docstrings(options.unseen, offset=len(texts))]
    task = EmbeddingDrift(unseen, tokenizer, dataset="docstrings of the Python standard library", split="unseen")
    original = AutoModel.from_pretrained(source).eval()
    trial = Trial(task, original)
    base = base_card_data(str(source))
    inherited = {name: base[name] for name in INHERITED if name in base}
    folders = []
    for name, settings in EXAMPLES.items():
        model = AutoModel.from_pretrained(source).eval()
        config = PruneConfig(**settings, samples=options.samples, held_out=held_out)
        report = prune(model, texts, config, tokenizer).with_metrics(trial.score(model))
        # Said by name: the folder of a package is nobody else's.
        report = replace(report, model=BASE, data={**report.data, "source": task.dataset})
        folder = options.out / name
        with tempfile.TemporaryDirectory() as scratch:
            saved = Path(scratch) / name
            save_pruned(saved, model, tokenizer, report)
            write_card(saved, report, f"user/{name}", inherited)
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            for part in (CARD_NAME, REPORT_NAME, PAGE_NAME, HTML_NAME):
                shutil.copy(saved / part, folder)
            shutil.copytree(saved / PLOT_FOLDER, folder / PLOT_FOLDER)
        folders.append(folder)
    return folders


if __name__ == "__main__":
    main()
