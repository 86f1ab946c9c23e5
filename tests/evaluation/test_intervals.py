import pytest
import torch
from scipy.stats import t

from hf_subprune.evaluation.intervals import ratio_interval


@pytest.mark.parametrize("samples", [2, 3, 4, 8, 64])
def test_of_a_mean_it_is_the_t_interval(samples):
    values = torch.randn(samples, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    low, high = ratio_interval(values, torch.ones(samples, dtype=torch.float64))
    reach = t.ppf(0.975, samples - 1) * float(values.std()) / samples**0.5
    assert low == pytest.approx(float(values.mean()) - reach, rel=3e-3)
    assert high == pytest.approx(float(values.mean()) + reach, rel=3e-3)


def test_it_covers_the_ratio_of_as_many_samples_as_it_says():
    generator = torch.Generator().manual_seed(0)
    hit = 0
    for _ in range(400):
        wholes = torch.rand(12, dtype=torch.float64, generator=generator) + 0.5
        parts = wholes * (2 + torch.randn(12, dtype=torch.float64, generator=generator))
        low, high = ratio_interval(parts, wholes)
        hit += low < 2 < high
    assert 0.9 < hit / 400 < 0.99


def test_one_sample_has_none():
    assert ratio_interval(torch.ones(1), torch.ones(1)) is None
    assert ratio_interval(torch.ones(2), torch.zeros(2)) is None
