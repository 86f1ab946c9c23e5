import json

import pytest

from hf_subprune import config
from hf_subprune.config import CONFIG_NAME, PruneConfig, field_help
from hf_subprune.solver import importance, selection


def test_defaults_are_accepted_and_every_field_is_documented():
    assert set(field_help()) == set(PruneConfig().to_dict())
    assert field_help()["samples"] == "Number of unlabeled samples to fit on."


def test_the_solver_knows_what_the_config_offers():
    assert config.IMPORTANCES == importance.IMPORTANCES and config.METHODS == selection.METHODS


@pytest.mark.parametrize(
    ("field", "value", "error", "said"),
    [
        ("keep", 0, ValueError, "fraction in (0, 1]"),
        ("keep", 1.01, ValueError, "1.01"),
        ("keep", float("nan"), ValueError, "nan"),
        ("keep", True, TypeError, "bool"),
        ("keep", "half", TypeError, "'half' of type str"),
        ("keep", {}, ValueError, "'mlp', 'attention'"),
        ("keep", {"mlp": 0.0}, ValueError, "fraction per unit kind"),
        ("keep", {"conv": 0.5}, ValueError, "'mlp', 'attention'"),
        ("keep", {"mlp": "half"}, TypeError, "fraction per unit kind"),
        ("units", (), ValueError, "one or more of 'mlp', 'attention'"),
        ("units", ("mlp", "mlp"), ValueError, "one or more of"),
        ("units", "mlp", TypeError, "of type str"),
        ("variant", "inchange", ValueError, "'layer', 'seq', 'asym'"),
        ("layout", "dense", ValueError, "'auto', 'stock', 'ragged'"),
        ("samples", 0, ValueError, "1 or more"),
        ("samples", 12.0, TypeError, "whole number"),
        ("held_out", 0, ValueError, "1 or more"),
        ("max_length", -1, ValueError, "-1"),
        ("batch_size", True, TypeError, "whole number"),
        ("reweight", 1, TypeError, "True or False"),
        ("shrinkage", "cross", ValueError, "'auto' or a finite number"),
        ("shrinkage", -0.1, ValueError, "0 or more"),
        ("shrinkage", float("inf"), ValueError, "inf"),
        ("round_to", 0, ValueError, "1 or more"),
        ("include", "encoder.*", TypeError, "tuple of block name patterns"),
        ("exclude", (3,), ValueError, "tuple of block name patterns"),
        ("seed", -1, ValueError, "0 or more"),
    ],
)
def test_bad_values_are_refused_on_construction_and_on_assignment(field, value, error, said):
    with pytest.raises(error) as raised:
        PruneConfig(**{field: value})
    assert f"PruneConfig.{field}" in str(raised.value)
    assert said in str(raised.value)

    config = PruneConfig()
    with pytest.raises(error):
        setattr(config, field, value)
    assert config == PruneConfig()


def test_unknown_fields_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"no field 'sparsity'\. Fields: keep, units, variant"):
        PruneConfig.from_dict({"sparsity": 0.5})
    with pytest.raises(AttributeError, match="no field 'sparsity'"):
        PruneConfig().sparsity = 0.5


def test_a_stored_dict_is_not_shared_with_the_caller():
    keep = {"mlp": 0.5}
    config = PruneConfig(keep=keep)
    keep["mlp"] = 2.0
    config.to_dict()["keep"]["mlp"] = 3.0
    assert config.keep == {"mlp": 0.5}


def test_save_and_load_round_trip(tmp_path):
    config = PruneConfig(keep={"attention": 0.75}, units=("attention",), shrinkage=0.1, exclude=("encoder.layer.0.*",))
    path = config.save_pretrained(tmp_path / "new")
    assert path == tmp_path / "new" / CONFIG_NAME
    stored = json.loads(path.read_text())
    assert list(stored) == sorted(stored)
    assert PruneConfig.from_pretrained(tmp_path / "new") == config
    assert PruneConfig.from_pretrained(path) == config


def test_yaml_recipes_load(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("keep: {mlp: 0.5}  # neurons only\nexclude: ['encoder.layer.0.*']\n")
    assert PruneConfig.from_pretrained(file) == PruneConfig(keep={"mlp": 0.5}, exclude=("encoder.layer.0.*",))


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("c.json", '{"keep": 0.', "corrupted"),
        ("c.json", "[0.5]", "must hold fields and values, got list"),
        ("c.yaml", "keep: [", "corrupted"),
        ("c.json", '{"keep": 7}', "PruneConfig.keep takes a fraction"),
        ("c.json", '{"sparsity": 0.5}', "no field 'sparsity'"),
    ],
)
def test_broken_files_are_named(tmp_path, name, text, said):
    file = tmp_path / name
    file.write_text(text)
    with pytest.raises(ValueError) as raised:
        PruneConfig.from_pretrained(file)
    assert str(file) in str(raised.value)
    assert said in str(raised.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=CONFIG_NAME):
        PruneConfig.from_pretrained(tmp_path)


def test_a_fraction_of_a_kind_that_is_not_pruned_is_an_error():
    with pytest.raises(ValueError, match="keep says how much of channels, experts to keep, but units holds mlp, att"):
        PruneConfig(keep={"mlp": 0.5, "experts": 0.5, "channels": 0.5})


def test_a_config_comes_as_it_is_as_a_dict_or_not_at_all():
    config = PruneConfig(keep=0.7)
    assert PruneConfig.of(config) is config
    assert PruneConfig.of({"keep": 0.7}) == config
    assert PruneConfig.of(None) == PruneConfig()
    with pytest.raises(TypeError, match="`config` must be a PruneConfig or a dict of its fields, not float"):
        PruneConfig.of(0.7)
