import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from batches import ready_batches
from runs_of import QUICK
from tiny import tiny

from hf_subprune import PruneConfig, prune
from hf_subprune.models.offload import loaded, stored, taken_over
from hf_subprune.models.running import is_offloaded, modules_by_path

CPU = torch.device("cpu")


def on_disk(model, folder):
    return disk_offload(model, str(folder), CPU)


def in_cpu_memory(model, _folder):
    return cpu_offload(model, CPU)


def layers_on_disk(model, folder):
    base = model.base_model_prefix
    device_map = {name: "cpu" for name, _ in model.named_children() if name != base}
    for name, _ in getattr(model, base).named_children():
        device_map[f"{base}.{name}"] = "disk" if "layer" in name or name == "encoder" else "cpu"
    return dispatch_model(model, device_map, main_device="cpu", offload_dir=str(folder), force_hooks=True)


def same_outputs(model, other, batches):
    with torch.no_grad():
        return all(torch.allclose(model(**batch).logits, other(**batch).logits, atol=1e-5) for batch in batches)


@pytest.mark.parametrize("variant", ["layer", "asym"])
@pytest.mark.parametrize("dispatch", [on_disk, in_cpu_memory, layers_on_disk])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_offloaded_models_are_pruned_as_those_in_memory(tmp_path, family, dispatch, variant):
    whole, model = tiny(family), tiny(family)
    batches = ready_batches(whole)
    config = PruneConfig(**QUICK, variant=variant)
    expected = prune(whole, batches, config)
    model = dispatch(model, tmp_path / "offloaded")
    report = prune(model, batches, config)
    assert [b.kept_units for b in report.blocks] == [b.kept_units for b in expected.blocks]
    assert [b.held_out_error for b in report.blocks] == pytest.approx([b.held_out_error for b in expected.blocks])
    assert report.drift == pytest.approx(expected.drift, rel=1e-5)
    assert (report.layout, report.layout_reason) == (expected.layout, expected.layout_reason)
    assert report.latency is None
    assert not is_offloaded(model)
    assert any(p.is_meta for p in model.parameters())
    assert same_outputs(model, whole, batches)


def test_offloaded_models_are_saved_as_those_in_memory(tmp_path):
    whole = tiny("llama", tie_word_embeddings=True)
    whole.save_pretrained(tmp_path / "original")
    device_map = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    model = type(whole).from_pretrained(
        tmp_path / "original", device_map={**device_map, "lm_head": "cpu"}, offload_folder=tmp_path / "offloaded"
    )
    batches = ready_batches(whole)
    config = PruneConfig(**QUICK)
    prune(whole, batches, config)
    prune(model, batches, config)
    whole.save_pretrained(tmp_path / "expected", max_shard_size="40KB")
    model.save_pretrained(tmp_path / "found", max_shard_size="40KB")
    files = sorted(path.name for path in (tmp_path / "expected").iterdir())
    assert len([name for name in files if name.endswith(".safetensors")]) > 1
    assert sorted(path.name for path in (tmp_path / "found").iterdir()) == files
    # Reports and cards tell what was measured, latencies among it, and where from.
    for name in (name for name in files if "report" not in name and name != "README.md"):
        assert (tmp_path / "found" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes(), name


def test_a_failure_leaves_an_offloaded_model_as_it_was(tmp_path, monkeypatch):
    model, whole = tiny("llama"), tiny("llama")
    batches = ready_batches(whole)
    on_disk(model, tmp_path)
    config = copy.deepcopy(model.config.to_dict())
    monkeypatch.setattr("hf_subprune.solving.outcome.drift", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prune(model, batches, PruneConfig(**QUICK))
    assert model.config.to_dict() == config
    assert same_outputs(model, whole, batches)


def test_weights_are_in_memory_only_while_they_are_needed(tmp_path):
    model = tiny("llama")
    batch = ready_batches(model, count=1)[0]
    on_disk(model, tmp_path)
    layer = model.model.layers[1]
    seen = []
    with taken_over(modules_by_path(model), model.all_tied_weights_keys):
        assert stored(layer.mlp.up_proj.weight) is not None
        assert stored(layer.input_layernorm.weight) is None
        layer.mlp.up_proj.register_forward_pre_hook(
            lambda module, *_: seen.append((module.weight.is_meta, layer.mlp.down_proj.weight.is_meta))
        )
        model(**batch)
        with loaded(layer):
            assert not any(p.is_meta for p in layer.parameters())
            assert model.model.layers[0].mlp.up_proj.weight.is_meta
        assert layer.mlp.up_proj.weight.is_meta
    assert seen == [(False, True)]


def test_global_budgets_work_on_offloaded_models(tmp_path):
    whole, model = tiny("bert"), tiny("bert")
    batches = ready_batches(whole)
    config = PruneConfig(**QUICK, budget="global", layout="ragged")
    expected = prune(whole, batches, config)
    report = prune(on_disk(model, tmp_path), batches, config)
    assert [b.kept_units for b in report.blocks] == [b.kept_units for b in expected.blocks]
    assert same_outputs(model, whole, batches)
