import pytest
import torch
from accelerate import disk_offload, dispatch_model
from batches import ready_batches
from datasets import Dataset
from runs_of import FAMILIES, QUICK, assert_unchanged, files, snapshot
from tiny import tiny
from torch import nn

from hf_subprune import PruneConfig, PruneReport, prune
from hf_subprune.evaluation.drift import drift
from hf_subprune.evaluation.outputs import model_outputs
from hf_subprune.models.running import call, is_offloaded
from hf_subprune.pruning import prune_sizes
from hf_subprune.runs.workspace import Workspace
from hf_subprune.solving import outcome

ENOUGH = {**QUICK, "samples": 20}  # for new weights to be better than the old ones


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_shrinks_to_half_and_runs(family):
    model = tiny(family)
    batches = ready_batches(model)
    before = model.num_parameters()
    report = prune(model, batches, PruneConfig(**ENOUGH, budget="uniform"))
    assert {b.kind for b in report.blocks} == {"mlp", "attention"}
    for block in report.blocks:
        assert block.units_after == block.units_before // 2 == len(block.kept_units)
        assert list(block.kept_units) == sorted(set(block.kept_units))
        assert list(block.kept_columns) == sorted(set(block.kept_columns))
        consumer = model.get_submodule(block.consumer)
        width = consumer.weight.shape[1] if isinstance(consumer, nn.Linear) else consumer.weight.shape[0]
        assert width == len(block.kept_columns)
        assert 0 <= block.fitted_error < 1
        assert 0 < block.guarantee <= 1
    assert report.parameters.before == before
    assert report.parameters.after == model.num_parameters() < before
    assert report.macs.after < report.macs.before
    call(model, batches[0])


@pytest.mark.parametrize("family", ["bert", "mpnet"])
def test_importances_choose_units_of_their_own(family):
    chosen = []
    for importance in ("greedy", "activation_gradient", "wanda"):
        model = tiny(family)
        report = prune(model, ready_batches(model), PruneConfig(**QUICK, importance=importance, variant="layer"))
        chosen.append([block.kept_units for block in report.blocks])
    assert chosen[0] != chosen[1] != chosen[2]


@pytest.mark.parametrize("variant", ["layer", "seq", "asym", "residual"])
@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_new_weights_beat_plain_removal(family, variant):
    reports = {}
    for reweight in (True, False):
        model = tiny(family, **{"num_layers" if family == "t5" else "num_hidden_layers": 3})
        config = PruneConfig(**ENOUGH, variant=variant, reweight=reweight, budget="uniform")  # the same widths
        reports[reweight] = prune(model, ready_batches(model), config)
    first = [reports[reweight].blocks[0].fitted_error for reweight in (True, False)]  # later blocks see other inputs
    assert first[0] <= first[1]  # alike where cross-fitting leaves the weights as they are
    assert reports[True].drift["relative_error"] < reports[False].drift["relative_error"]


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_keeping_everything_changes_nothing(family):
    model = tiny(family)
    batches = ready_batches(model)
    before = snapshot(model)
    expected = call(model, batches[0]).logits
    report = prune(model, batches, PruneConfig(**QUICK, keep=1.0))
    assert torch.equal(call(model, batches[0]).logits, expected)
    assert_unchanged(model, before)
    assert all(block.units_after == block.units_before for block in report.blocks)
    assert report.parameters.ratio == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_flags_and_untouched_parameters_are_kept(dtype):
    model = tiny("llama").to(dtype)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    model.train()
    untouched = {id(p) for n, p in model.named_parameters() if "norm" in n or "embed" in n or "lm_head" in n}
    prune(model, ready_batches(model), PruneConfig(**QUICK))
    assert all(p.dtype == dtype for p in model.parameters())
    assert not model.model.layers[0].mlp.up_proj.weight.requires_grad
    assert model.model.layers[1].mlp.up_proj.weight.requires_grad
    assert all(module.training for module in model.modules())
    assert untouched <= {id(p) for p in model.parameters()}


def test_a_pruned_model_can_be_pruned_again():
    model = tiny("bert")
    batches = ready_batches(model)
    prune(model, batches, PruneConfig(**QUICK, budget="uniform"))
    again = prune(model, batches, PruneConfig(**QUICK, budget="uniform"))
    assert [b.units_after for b in again.blocks] == [b.units_before // 2 for b in again.blocks]
    assert {b.units_before for b in again.blocks if b.kind == "mlp"} == {28}


def test_kinds_can_be_kept_apart():
    model = tiny("bert")
    config = PruneConfig(**QUICK, keep={"mlp": 0.25, "attention": 0.75}, budget="uniform")
    report = prune(model, ready_batches(model), config)
    assert {(b.kind, b.units_after) for b in report.blocks} == {("mlp", 14), ("attention", 3)}


def test_excluded_blocks_and_included_ones():
    model = tiny("bert")
    whole = "bert.encoder.layer.0.*"
    report = prune(model, ready_batches(model), PruneConfig(**QUICK, exclude=(whole,)))
    assert not any(b.name.startswith("bert.encoder.layer.0.") for b in report.blocks)
    model = tiny("bert")
    report = prune(model, ready_batches(model), PruneConfig(**QUICK, include=(whole,), units=("mlp",)))
    assert [b.consumer for b in report.blocks] == ["bert.encoder.layer.0.output.dense"]


def test_labels_are_never_used():
    results = []
    for labels in (None, 0, 1):
        model = tiny("bert")
        batches = ready_batches(model)
        if labels is not None:
            batches = [{**b, "labels": torch.full((4,), labels)} for b in batches]
        prune(model, batches, PruneConfig(**QUICK))
        results.append(model.state_dict())
    assert all(torch.equal(results[0][name], other[name]) for other in results[1:] for name in other)


def test_the_same_seed_gives_the_same_model():
    results = []
    for _ in range(2):
        model = tiny("bert")
        prune(model, ready_batches(model), PruneConfig(**QUICK))
        results.append(model.state_dict())
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 0.01}, r"keep=0\.01 is out of reach: .* Keep at least 0\.\d+"),
        ({"keep": 0.01, "budget": "uniform"}, r"keep=0\.01 would leave block .* none of its 4 attention units"),
        ({"exclude": ("*",)}, "No prunable block is left"),
        ({"exclude": ("nothing.like.it",)}, r"'nothing\.like\.it' matches no block; the blocks are bert\.encoder"),
    ],
)
def test_impossible_requests_change_nothing(settings, message):
    model = tiny("bert")
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        prune(model, ready_batches(model), PruneConfig(**{**QUICK, **settings}))
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([], ValueError, "empty|no sample"),
        (3, TypeError, "int"),
        (["a sentence"] * 9, ValueError, "processing_class"),
        (Dataset.from_dict({"score": [0.1] * 9}), ValueError, "score"),
    ],
)
def test_bad_data_changes_nothing(data, error, message):
    model = tiny("bert")
    before = snapshot(model)
    with pytest.raises(error, match=message):
        prune(model, data, PruneConfig(**QUICK))
    assert_unchanged(model, before)


def test_activations_that_are_not_finite_change_nothing():
    model = tiny("vit")
    batches = ready_batches(model)
    batches[2]["pixel_values"][1, 0, 0, 0] = float("inf")
    before = snapshot(model)
    with pytest.raises(ValueError, match="NaN or inf"):
        prune(model, batches, PruneConfig(**QUICK))
    assert_unchanged(model, before)


@pytest.mark.parametrize("stage", ["verify", "choose_layout", "drift"])
@pytest.mark.parametrize("variant", ["layer", "asym"])
def test_a_failure_at_any_stage_restores_the_model(monkeypatch, stage, variant):
    model = tiny("llama")
    before = snapshot(model)

    def fail(*_args, **_kwargs):
        raise RuntimeError("on purpose")

    monkeypatch.setattr(outcome, stage, fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        prune(model, ready_batches(model), PruneConfig(**QUICK, variant=variant))
    assert_unchanged(model, before)


def test_a_failure_between_blocks_restores_the_model(computed):
    model = tiny("bert")
    before = snapshot(model)
    computed.stop_at_block(2, RuntimeError("on purpose"))
    with pytest.raises(RuntimeError, match="on purpose"):
        prune(model, ready_batches(model), PruneConfig(**QUICK, variant="seq"))
    assert len(computed.blocks) == 3
    assert_unchanged(model, before)


def test_models_that_cannot_be_pruned_are_refused():
    with pytest.raises(TypeError, match="PreTrainedModel, got Linear"):
        prune(nn.Linear(2, 2), [])
    with torch.device("meta"):
        meta = tiny.__wrapped__("bert") if hasattr(tiny, "__wrapped__") else type(tiny("bert"))(tiny("bert").config)
    compiled = tiny("bert")
    compiled.base_model.encoder.compile()
    with pytest.raises(ValueError, match="encoder' is compiled: load the model anew, prune it"):
        prune(compiled, [])
    compiled = tiny("bert")
    compiled.forward = torch.compile(compiled.forward)
    with pytest.raises(ValueError, match=r"'Bert.*' is compiled"):
        prune(compiled, [])
    compiled = tiny("bert")
    compiled.base_model.encoder.layer[1] = torch.compile(compiled.base_model.encoder.layer[1])
    with pytest.raises(ValueError, match=r"encoder\.layer\.1' is compiled"):
        prune(compiled, [])
    with torch.inference_mode(), pytest.raises(ValueError, match="load and prune the model outside of it"):
        prune(tiny("bert"), [])
    with torch.inference_mode():
        made_inside = tiny("bert")
    with pytest.raises(ValueError, match="load and prune the model outside of it"):
        prune(made_inside, [])
    with pytest.raises(ValueError, match="meta device"):
        prune(meta, [])
    quantized = tiny("bert")
    quantized.is_quantized, quantized.quantization_method = True, "fp8"
    with pytest.raises(ValueError, match=r"quantized.*fp8"):
        prune(quantized, [])


def test_adapters_must_be_merged_first():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny("bert"), peft.LoraConfig(target_modules=["query"]))
    with pytest.raises(ValueError, match="merge"):
        prune(model, [])


def test_the_report_can_be_saved_read_and_printed(tmp_path):
    model = tiny("bert")
    batches = ready_batches(model, count=4)
    report = prune(model, batches, PruneConfig(**QUICK))
    report.save(tmp_path)
    assert PruneReport.load(tmp_path) == report
    assert "bert.encoder.layer.1.attention" in str(report)
    assert report.config["keep"] == 0.5
    reference = model_outputs(tiny("bert"), batches[-1:])
    assert report.drift == pytest.approx(drift(model, batches[-1:], reference).to_dict(), rel=1e-5)


def test_a_stock_layout_that_the_config_cannot_say_is_refused_before_any_work(computed):
    model = tiny("bert")
    before = snapshot(model)
    with pytest.raises(ValueError, match="layout='stock' is not possible"):
        prune(model, ready_batches(model), PruneConfig(**QUICK, layout="stock", units=("mlp", "attention")))
    assert computed.names == ["blocks"]  # the data was not run
    assert_unchanged(model, before)


def test_an_abandoned_size_is_taken_back():
    model = tiny("bert")
    full = model.num_parameters()
    sizes = prune_sizes(model, ready_batches(model), [PruneConfig(**QUICK, layout="ragged")])
    next(sizes)
    assert model.num_parameters() < full
    sizes.close()
    assert model.num_parameters() == full


def test_sizes_may_differ_in_size_only():
    model = tiny("bert")
    configs = [
        PruneConfig(**QUICK, layout="ragged"),
        PruneConfig(**{**QUICK, "samples": 10}, layout="ragged", variant="seq"),
    ]
    with pytest.raises(ValueError, match="differ in samples, variant"):
        next(prune_sizes(model, ready_batches(model), configs))


@pytest.mark.parametrize("size", [0, 1])
@pytest.mark.parametrize("variant", ["layer", "asym"])
def test_a_failure_at_any_size_restores_the_model(monkeypatch, variant, size):
    model = tiny("llama")
    before = snapshot(model)
    exchange, installed = Workspace.exchange, []

    def fail_midway(work, owner, value):
        installed.append(work)
        if len(installed) == 4 * size + 3:
            raise RuntimeError("on purpose")
        return exchange(work, owner, value)

    monkeypatch.setattr(Workspace, "exchange", fail_midway)
    configs = [PruneConfig(**QUICK, variant=variant, keep=keep, budget="uniform") for keep in (0.75, 0.5)]
    sizes = prune_sizes(model, ready_batches(model), configs)
    for _ in range(size):
        assert next(sizes).parameters.after == model.num_parameters()
    with pytest.raises(RuntimeError, match="on purpose"):
        next(sizes)
    assert len(installed) == 4 * size + 3
    assert_unchanged(model, before)


def on_disk(model, folder):
    return disk_offload(model, str(folder), torch.device("cpu"))


def layers_on_disk(model, folder):
    base = model.base_model_prefix
    paths = [name for name, _ in model.named_children() if name != base]
    paths += [f"{base}.{name}" for name, _ in getattr(model, base).named_children()]
    places = {path: "disk" if path.endswith(".layers") else "cpu" for path in paths}
    return dispatch_model(model, places, main_device="cpu", offload_dir=str(folder), force_hooks=True)


def read_by_accelerate(model):
    """By name, the parameters that its hooks read from elsewhere when their modules run."""
    found = {}
    for path, module in model.named_modules():
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", [hook]):
            if getattr(one, "offload", False):
                names = [name for name, _ in module.named_parameters(recurse=one.place_submodules)]
                found |= {f"{path}.{name}": one.weights_map[name] for name in names}
    return found


@pytest.mark.parametrize("variant", ["layer", "residual"])
@pytest.mark.parametrize("dispatch", [on_disk, layers_on_disk])
def test_a_dispatched_model_comes_in_several_sizes(tmp_path, dispatch, variant):
    whole, model = tiny("llama"), dispatch(tiny("llama"), tmp_path / "offloaded")
    batches, config_before, read_before = ready_batches(whole), model.config.to_dict(), set(read_by_accelerate(model))
    settings = {**QUICK, "variant": variant}
    configs = [PruneConfig(**settings, keep=0.75, layout="ragged"), PruneConfig(**settings, keep=0.5)]
    assert read_before
    for config, report in zip(configs, prune_sizes(model, batches, configs), strict=True):
        alone = tiny("llama")
        expected = prune(alone, batches, config)
        assert [b.kept_units for b in report.blocks] == [b.kept_units for b in expected.blocks]
        assert (report.layout, report.latency, report.parameters) == (expected.layout, None, expected.parameters)
        assert report.drift == pytest.approx(expected.drift, rel=1e-5)
        # While it is held it is dispatched as it was, by accelerate alone.
        assert not is_offloaded(model) and any(parameter.is_meta for parameter in model.parameters())
        read = read_by_accelerate(model)
        assert set(read) == read_before
        assert all(torch.equal(value, alone.get_parameter(name)) for name, value in read.items())
        for batch in batches:
            torch.testing.assert_close(call(model, batch).logits, call(alone, batch).logits)
        if dispatch is on_disk:  # Transformers saves only what was dispatched by a map
            continue
        model.save_pretrained(tmp_path / f"found-{config.keep}")
        alone.save_pretrained(tmp_path / f"expected-{config.keep}")
        assert files(tmp_path / f"found-{config.keep}") == files(tmp_path / f"expected-{config.keep}")
    read = read_by_accelerate(model)
    assert not is_offloaded(model) and set(read) == read_before
    assert all(torch.equal(value, whole.get_parameter(name)) for name, value in read.items())
    assert model.config.to_dict() == config_before
    for batch in batches:
        torch.testing.assert_close(call(model, batch).logits, call(whole, batch).logits)
