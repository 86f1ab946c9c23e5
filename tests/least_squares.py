"""Problems of least squares, and what subsets of their columns explain, from the raw rows."""

import torch


def problem(n=24, m=6, rows=200, seed=0, dtype=torch.float64):
    """Moments of correlated columns with a low-rank part, a target, and its squared norm."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    B = normal(rows, n // 3) @ normal(n // 3, n) + 0.5 * normal(rows, n)
    Y = B @ normal(n, m)
    return (B.T @ B).to(dtype), (B.T @ Y).to(dtype), float(Y.square().sum()), B, Y


def explained(B, Y, columns):
    """`||Y||^2` less the residual of least squares on raw rows, in float64."""
    if len(columns) == 0:
        return 0.0
    X = B[:, columns]
    return float(Y.square().sum() - (Y - X @ torch.linalg.lstsq(X, Y, driver="gelsd").solution).square().sum())


def brute_greedy(B, Y, groups, k, removal=False):
    """The paper's greedy (or backward elimination) with one least squares problem per candidate and step."""
    left, order = list(range(len(groups))), []
    for _ in range(k):

        def value(u):
            units = [v for v in left if v != u] if removal else [*order, u]
            return explained(B, Y, groups[units].reshape(-1))

        best = max(left, key=value)
        order.append(best)
        left.remove(best)
    return order
