"""What of imperfect moments is still factorised, and products that are symmetric."""

import pytest
import torch

from hf_subprune.solver.factorisation import add_symmetric, factorise, unit_scale


def indefinite(below, size=12):
    """A correlation matrix but for its least eigenvalue, which is so much below zero."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    values = torch.linspace(0.1, 2, size, dtype=torch.float64)
    values[0] = -below
    return vectors @ values.diag() @ vectors.T


@pytest.mark.parametrize("below", [1e-14, 1e-9, 3e-6])
def test_sums_of_float32_products_may_be_indefinite_in_float64(below):
    H = indefinite(below)
    factor, scale, jitter = factorise(H)
    assert 0 < jitter < 1000 * below
    scaled = scale[:, None] * H * scale
    torch.testing.assert_close(factor @ factor.T, scaled + jitter * torch.eye(12, dtype=torch.float64))


def test_what_is_no_rounding_error_is_refused():
    with pytest.raises(RuntimeError, match="12 columns are not positive semi-definite"):
        factorise(indefinite(0.1))


def test_columns_too_small_for_their_dtype_are_dead():
    small = torch.tensor([1.0, 1e-20, 1e-42, 0.0])
    assert unit_scale(small).ne(0).tolist() == [True, True, False, False]
    assert unit_scale(small.double()).ne(0).tolist() == [True, True, True, False]
    H = torch.eye(3)
    H[1:, 1:] = torch.tensor([[2.5e-44, 2.4e-44], [2.4e-44, 1.4e-44]])  # of no correlation at all
    factor, scale, jitter = factorise(H)
    assert jitter == 0 and scale.tolist() == [1.0, 0.0, 0.0]
    torch.testing.assert_close(factor, torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize("size", [1, 128, 129, 700])
def test_a_symmetric_product_is_added_in_panels(size):
    generator = torch.Generator().manual_seed(0)
    A, left = (torch.randn(rows, size, generator=generator, dtype=torch.float64) for rows in (size, 5))
    A, right = A + A.T, torch.randn(5, 5, generator=generator, dtype=torch.float64)
    right = (right + right.T) @ left  # so that left' right is symmetric
    expected = A - 2 * left.T @ right
    assert add_symmetric(A, left, right, alpha=-2) is A
    torch.testing.assert_close(A, expected)
