import pytest
from command_line import run

from hf_subprune import PruneConfig, PruneReport
from hf_subprune.cli.options import config_options


def test_options_override_the_config_file(folder, texts, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("keep: 0.75\nsamples: 24\nheld_out: 8\nunits: [mlp]\n")
    run("prune", folder, "--data", texts, "--out", tmp_path / "out", "--config", file, "--keep", 0.5, "--seed", 3)
    config = PruneConfig.from_dict(PruneReport.load(tmp_path / "out").config)
    assert (config.keep, config.samples, config.units, config.seed) == (0.5, 24, ("mlp",), 3)


@pytest.mark.parametrize(
    "text", ["mlp=0.5,attention=0.75", "mlp = 0.5, attention = 0.75", '{"mlp": 0.5, "attention": 0.75}']
)
def test_a_fraction_for_each_kind_is_given_in_short_or_as_json(text):
    @config_options
    def command(configs):
        given.extend(configs)

    given = []
    command(keep=[text, "0.5"], **dict.fromkeys(set(PruneConfig().to_dict()) - {"keep"}))
    assert [config.keep for config in given] == [{"mlp": 0.5, "attention": 0.75}, 0.5]


def test_every_field_of_the_config_is_an_option():
    printed = run("prune", "--help-all")
    missing = [name for name in PruneConfig().to_dict() if f"--{name.replace('_', '-')}" not in printed]
    assert not missing
