import pytest
import torch
from batches import ready_batches
from fresh import run_fresh
from runs_of import FAMILIES
from same import assert_same_weights
from tiny import tiny

from hf_subprune import PruneConfig, prune
from hf_subprune.models.running import call, floating_tensors

SETTINGS = {"samples": 12, "held_out": 4, "batch_size": 4, "loss_aware": False}
WIDE = {
    "bert": ["intermediate_size"],
    "vit": ["intermediate_size"],
    "gpt2": ["n_inner"],
    "llama": ["intermediate_size"],
    "t5": ["d_ff"],
    "whisper": ["encoder_ffn_dim", "decoder_ffn_dim"],
}
"""What is four times as wide as the model, as in real ones, by family."""


def assert_same(first, second, batch):
    assert_same_weights(second, first)
    expected, found = (list(floating_tensors(call(m.eval(), batch))) for m in (first, second))
    assert len(expected) == len(found) > 0
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_ragged_models_load_exactly(family, tmp_path):
    model = tiny(family)
    batches = ready_batches(model)
    report = prune(model, batches, PruneConfig(**SETTINGS, budget="global", layout="ragged"))
    assert report.layout == "ragged"
    model.save_pretrained(tmp_path)
    assert_same(model, type(model).from_pretrained(tmp_path), batches[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_mlp_widths_load_exactly_as_stock(family, tmp_path):
    model = tiny(family)
    batches = ready_batches(model)
    report = prune(model, batches, PruneConfig(**SETTINGS, units=("mlp",), layout="stock"))
    assert report.layout == "stock"
    model.save_pretrained(tmp_path)
    assert "subprune" not in (tmp_path / "config.json").read_text()
    assert_same(model, type(model).from_pretrained(tmp_path), batches[0])


@pytest.mark.slow
def test_every_default_result_loads_in_a_fresh_process_with_nothing_but_transformers(tmp_path):
    for family, wide in WIDE.items():
        model = tiny(family, **dict.fromkeys(wide, 192))
        batches = ready_batches(model)
        whole = model.num_parameters()
        report = prune(model, batches, PruneConfig(samples=12, held_out=4, batch_size=4))
        assert report.layout == "stock" and model.num_parameters() < whole
        model.save_pretrained(tmp_path / family)
        torch.save([batches[0], call(model.eval(), batches[0])[0]], tmp_path / family / "call.pt")
    script = """
        import json, sys
        from pathlib import Path
        sys.modules["hf_subprune"] = None
        import torch, transformers
        gaps = {}
        for folder in sorted(Path(sys.argv[1]).iterdir()):
            (name,) = json.loads((folder / "config.json").read_text())["architectures"]
            model = getattr(transformers, name).from_pretrained(folder).eval()
            batch, expected = torch.load(folder / "call.pt")
            with torch.no_grad():
                gaps[folder.name] = (model(**batch)[0] - expected).abs().max().item()
        print(json.dumps(gaps))
        """
    gaps, _ = run_fresh(script, tmp_path)
    assert gaps.keys() == WIDE.keys() and max(gaps.values()) < 1e-5
