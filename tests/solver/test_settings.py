import torch

from hf_subprune import PruneConfig
from hf_subprune.solver.settings import Settings, Tuning


def test_settings_are_those_of_the_config():
    assert Settings.of(PruneConfig()) == Settings()
    config = PruneConfig(
        shrinkage=0.3, importance="wanda", method="backward", swaps=0, reweight=False, variant="layer", seed=7
    )
    assert Settings.of(config) == Settings(0.3, "wanda", "backward", 0, False, 7)


def test_random_choices_begin_anew_with_each_block():
    settings = Settings(seed=3)
    draws = [torch.rand(4, generator=settings.generator()) for _ in range(2)]
    assert torch.equal(*draws)
    assert not torch.equal(draws[0], torch.rand(4, generator=Settings(seed=4).generator()))


def test_selection_has_a_finite_shrinkage():
    assert Settings(shrinkage=0.7).selection_shrinkage(100, 10) == 0.7
    assert Settings(shrinkage=float("inf")).selection_shrinkage(100, 10) < float("inf")


def test_selection_is_shrunk_less_the_more_rows_there_are():
    few, some, many = (Settings().selection_shrinkage(rows, 100) for rows in (10, 100, 1000))
    assert few == some > many > 0


def test_wide_problems_are_in_float32():
    assert Tuning(double_below=8).dtype(8) == torch.float64
    assert Tuning(double_below=8).dtype(9) == torch.float32
