from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from hf_subprune.bench.scale import random_checkpoint
from hf_subprune.cli import app


def test_a_random_checkpoint_loads_and_has_a_file_a_layer(tmp_path):
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4
    )
    size = random_checkpoint(tmp_path, config)
    model, info = LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert sum(p.nbytes for p in model.parameters()) == size
    assert len(list(tmp_path.glob("*.safetensors"))) == 4


@pytest.mark.slow
def test_the_bench_shows_a_row_for_each_size(tmp_path, monkeypatch, forkserver, without_plots):
    monkeypatch.setattr("hf_subprune.bench.scale.multiprocessing", SimpleNamespace(get_context=lambda _: forkserver))
    arguments = ["bench", "scale", "--layers", "1", "--layers", "2", "--samples", "2", "--width", "32"]
    done = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "hidden states" in done.output
    assert (tmp_path / "scale.json").is_file()
