"""What selection, certificates and reweighting share: the columns of units, and checks of a problem's tensors."""

import torch


def columns_of(units: torch.Tensor, groups: torch.Tensor | None) -> torch.Tensor:
    """Sorted columns of units: `units` themselves without groups, else the sorted entries of `groups[units]`."""
    return units if groups is None else groups.to(units.device)[units].reshape(-1).sort().values


def check_problem(H: torch.Tensor, C: torch.Tensor, groups: torch.Tensor | None = None) -> torch.Tensor:
    """The groups `(units, c)` of a selection problem, after checking that its tensors fit together.

    Raises:
        ValueError: a shape does not fit, an entry is not finite, or groups overlap or point outside of `H`.
    """
    n = H.shape[0]
    if H.ndim != 2 or H.shape[1] != n or C.ndim != 2 or C.shape[0] != n:
        raise ValueError(f"Moments must be H (n, n) and C (n, m), got {tuple(H.shape)} and {tuple(C.shape)}.")
    # Extremes pass on missing values, and unlike isfinite(H) they need no memory of the size of H.
    if not all(torch.isfinite(torch.stack(x.aminmax())).all() for x in (H, C) if x.numel()):
        raise ValueError("The moments hold infinite or missing values: check the calibration activations.")
    if groups is None:
        return torch.arange(n, device=H.device)[:, None]
    if groups.ndim != 2 or groups.numel() > n or groups.min() < 0 or groups.max() >= n:
        raise ValueError(f"Groups must be (units, c) columns below {n}, got shape {tuple(groups.shape)}.")
    if len(groups.unique()) != groups.numel():
        raise ValueError("Groups must not share columns.")
    return groups.to(H.device)
