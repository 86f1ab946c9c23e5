import pytest
import torch
import transformers as tf
from hand_pruned import FAMILIES, IMAGE, SIZES, TEXT
from torch import nn

from hf_subprune.storage.spec import FORMAT, LayoutSpec, apply_spec

CLASSIFIER = LayoutSpec(
    {
        "bert.encoder.layer.0.intermediate.dense.weight": (40, 32),
        "bert.encoder.layer.0.intermediate.dense.bias": (40,),
        "bert.encoder.layer.0.output.dense.weight": (32, 40),
    },
    {
        "bert.encoder.layer.0.intermediate.dense": {"out_features": 40},
        "bert.encoder.layer.0.output.dense": {"in_features": 40},
    },
)
ENCODER = LayoutSpec(
    {name.removeprefix("bert."): shape for name, shape in CLASSIFIER.shapes.items()},
    {path.removeprefix("bert."): values for path, values in CLASSIFIER.attributes.items()},
)


def bert(cls):
    return cls(tf.BertConfig(**SIZES, **TEXT, max_position_embeddings=16))


@pytest.mark.parametrize("spec", [CLASSIFIER, ENCODER])
@pytest.mark.parametrize("cls", [tf.BertForSequenceClassification, tf.BertForMaskedLM, tf.BertModel])
def test_widths_reach_the_model_inside_and_the_class_around(spec, cls):
    model = bert(cls)
    applied = apply_spec(model, spec)
    encoder = getattr(model, "bert", model).encoder
    assert encoder.layer[0].intermediate.dense.weight.shape == (40, 32)
    assert encoder.layer[0].output.dense.in_features == 40
    assert encoder.layer[1].intermediate.dense.weight.shape == (44, 32)
    assert applied == (ENCODER if cls is tf.BertModel else CLASSIFIER)


def test_applying_twice_changes_nothing_more_and_keeps_leading_entries():
    model = bert(tf.BertModel)
    before = model.encoder.layer[0].intermediate.dense.weight.detach().clone()
    apply_spec(model, ENCODER)
    weight = model.encoder.layer[0].intermediate.dense.weight
    apply_spec(model, ENCODER)
    assert model.encoder.layer[0].intermediate.dense.weight is weight
    assert torch.equal(weight, before[:40])


def test_frozen_parameters_stay_frozen_and_dtype_is_kept():
    model = bert(tf.BertModel).bfloat16().requires_grad_(False)
    apply_spec(model, ENCODER)
    weight = model.encoder.layer[0].intermediate.dense.weight
    assert weight.dtype == torch.bfloat16 and not weight.requires_grad


def test_a_unique_place_is_found_under_any_prefix():
    outer = nn.ModuleDict({"text": bert(tf.BertModel)})
    applied = apply_spec(outer, ENCODER)
    assert set(applied.attributes) == {f"text.{path}" for path in ENCODER.attributes}


def test_two_possible_places_are_refused():
    outer = nn.ModuleDict({"query": bert(tf.BertModel), "passage": bert(tf.BertModel)})
    with pytest.raises(ValueError, match=r"could mean 'passage\.encoder.*' or 'query\.encoder"):
        apply_spec(outer, ENCODER)
    assert outer["query"].encoder.layer[0].intermediate.dense.weight.shape == (44, 32)


def test_a_part_that_two_prefixes_could_mean_is_refused():
    part = tf.CLIPVisionModel(tf.CLIPVisionConfig(**SIZES, **IMAGE))
    widths = {"encoder.layers.0.mlp.fc1.bias": (40,)}
    both = LayoutSpec(
        {f"{prefix}.{name}": s for prefix in ("text_model", "vision_model") for name, s in widths.items()}
    )
    with pytest.raises(ValueError, match="could mean"):
        apply_spec(part, both)
    apply_spec(part, both.restricted_to("vision_model"))
    assert part.encoder.layers[0].mlp.fc1.bias.shape == (40,)


def test_another_architecture_is_refused():
    with pytest.raises(ValueError, match="which LlamaForCausalLM does not have: load the class that was pruned"):
        apply_spec(FAMILIES["llama"].build(), ENCODER)


@pytest.mark.parametrize("shape", [(64, 32), (40,)])
def test_widths_that_the_config_does_not_hold_are_refused(shape):
    spec = LayoutSpec({"encoder.layer.0.intermediate.dense.weight": shape})
    with pytest.raises(ValueError, match=r"intermediate\.dense\.weight was saved with shape .*\(44, 32\).*restore it"):
        apply_spec(bert(tf.BertModel), spec)


@pytest.mark.parametrize("name", ["head_count", "config.head_count"])
def test_attributes_that_the_code_no_longer_has_are_refused(name):
    spec = LayoutSpec({}, {"encoder": {name: 3}})
    with pytest.raises(
        ValueError, match=f"encoder was saved with {name}=3, but BertEncoder has no {name} of that size or more here"
    ):
        apply_spec(bert(tf.BertModel), spec)


def test_resized_buffers_are_saved_from_then_on():
    model = bert(tf.BertModel)
    assert "embeddings.position_ids" not in model.state_dict()
    apply_spec(model, LayoutSpec({"embeddings.position_ids": (1, 8)}))
    assert model.state_dict()["embeddings.position_ids"].shape == (1, 8)


def test_round_trip():
    assert LayoutSpec.from_dict(CLASSIFIER.to_dict()) == CLASSIFIER


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"shapes": None}, "shape of 'shapes' is None"),
        ({"shapes": {"a": [4, -1]}}, "shape of 'a' is"),
        ({"shapes": {"a": [4.0]}}, "shape of 'a' is"),
        ({"attributes": {"a": {"b": "4"}}}, "attributes of 'a' are"),
        ({"arguments": [1, 2]}, "arguments of 'arguments' are"),
        ({"arguments": {"a": {"b": [0, 4]}}}, "arguments of 'a' are"),
        ({"arguments": {"a": {"b": [0, 4, 5]}}}, "arguments of 'a' are"),
        ({"arguments": {"a": {"b": ["0", 4, None]}}}, "arguments of 'a' are"),
        ({"bypassed": [1]}, "'bypassed' is bypassed as"),
        ({"bypassed": {"a": ["", 10**12]}}, "'a' is bypassed as"),
        ({"bypassed": {"a": [3, 0]}}, "'a' is bypassed as"),
        ({"format": True}, "format is True"),
        ({"shapes": {}}, "digest does not match"),
        ({"format": FORMAT + 1}, "pip install -U hf_subprune"),
    ],
)
def test_damaged_entries_are_refused(damage, message):
    with pytest.raises(ValueError, match=message):
        LayoutSpec.from_dict(CLASSIFIER.to_dict() | damage)


@pytest.mark.parametrize("key", ["format", "shapes", "attributes", "digest"])
def test_incomplete_entries_are_refused(key):
    entry = CLASSIFIER.to_dict()
    del entry[key]
    with pytest.raises(ValueError, match=f"'{key}' is missing.*restore config.json"):
        LayoutSpec.from_dict(entry)


SELF = "encoder.layer.0.attention.self"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (LayoutSpec({f"{SELF}.query.weight": (10**9, 10**9)}), "does not fit inside the shape"),
        (LayoutSpec({"encoder.layer": (3,)}), "does not have"),
        (LayoutSpec({f"{SELF}.query.__class__": (3,)}), "does not have"),
        (LayoutSpec({}, {SELF: {"num_attention_heads": 10**9}}), "of that size or more"),
        (LayoutSpec({}, {SELF: {"num_attention_heads": -7}}), "of that size or more"),
        (LayoutSpec({}, {SELF: {"inner_width": 10**12}}), "inner width of 1000000000000"),
        (LayoutSpec({}, {}, {SELF: {"hidden_states": (0, 10**12, 10**12)}}), "1000000000000 entries"),
        (LayoutSpec({}, {}, {SELF: {"a.b": (0, 4, 2)}}), "its argument 'a.b'"),
        (LayoutSpec({}, {}, {SELF: {"hidden_states": (99, 4, 2)}}), "along dimension 99"),
        (LayoutSpec({}, {}, {}, {SELF: ("nowhere", 0)}), "a consumer 'nowhere'"),
        (LayoutSpec({}, {}, {}, {f"{SELF}.dropout": ("", 0)}), "a consumer ''"),
        *(
            (LayoutSpec({}, {"encoder": {name: 3}}), f"no {name} of that size")
            for name in ("__class__", "__dict__", "_modules", "_parameters", "_forward_hooks", "forward", "config")
        ),
        (LayoutSpec({}, {SELF: {"config.__class__": 3}}), "of that size or more"),
        (LayoutSpec({f"a{i}.layer.{i}.w": (1, 1) for i in range(20000)}), "does not have"),
    ],
)
def test_a_made_up_entry_can_do_nothing_but_narrow(spec, message):
    with pytest.raises(ValueError, match=message):
        apply_spec(bert(tf.BertModel), spec)


def test_parts_that_could_be_meant_in_many_ways_are_refused_at_once():
    model = nn.ModuleDict({f"m{i}": nn.ModuleDict({"query": nn.Linear(2, 2)}) for i in range(300)})
    with pytest.raises(ValueError, match="could mean 300 different parts"):
        apply_spec(model, LayoutSpec({"query.weight": (1, 2)}))
