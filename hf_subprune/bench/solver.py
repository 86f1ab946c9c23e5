"""Time and objective of the solver's methods, each as a ratio measured in the same run. Tensors only."""

import itertools
import math
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch

from ..solver.moments import Moments
from ..solver.objective import Objective, regularise
from ..solver.selection import backward, greedy, select
from ..solver.settings import Settings

# (n, m): inputs and outputs of the consumers of a small encoder and of BERT-base.
SIZES = ((384, 96), (1536, 384), (3072, 768))
# Of the synthetic problems, and of moments given without a shrinkage of their own.
_SHRINKAGE = 0.1


def synthetic_moments(
    n: int,
    m: int,
    *,
    rows: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    alike: bool = False,
) -> tuple[Moments, torch.Tensor]:
    """Moments of correlated GELU activations of varying strength, and the weight `(n, m)` that follows them.

    Args:
        n: Inputs.
        m: Outputs.
        rows: Rows summed over; twice `n` by default.
        dtype: Of the result.
        seed: Of the random numbers.
        alike: Of ReLU activations of one strength instead: many columns add about as much, and selection has to look
            at all of them.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    rank, rows = max(n // 4, 1), 2 * n if rows is None else rows
    mixing = normal(rank, n) / math.sqrt(rank)
    strength, offset = 0.2 + 2 * torch.rand(n, generator=generator), torch.rand(n, generator=generator)
    W = normal(n, m) / math.sqrt(n)
    H = torch.zeros(n, n)
    for start in range(0, rows, 4096):
        size = min(4096, rows - start)
        B = normal(size, rank) @ mixing + 0.3 * normal(size, n)
        B = torch.relu(B) if alike else torch.nn.functional.gelu(B * strength - offset)
        H.addmm_(B.T, B)
    C = H @ W
    t = float((W * C).sum(dtype=torch.float64))
    mean = torch.zeros(n)
    moments = Moments(H.to(dtype), C.to(dtype), t, rows, mean.to(dtype), torch.zeros(m, dtype=dtype), False)
    return moments, W.to(dtype)


def rank_one_backward(H: torch.Tensor, C: torch.Tensor, steps: int) -> torch.Tensor:
    """The yardstick: backward elimination of single columns with one rank-one update of `H^-1` a step.

    Args:
        H: `(n, n)` positive definite.
        C: `(n, m)`.
        steps: Number of columns to remove.

    Returns:
        `(steps,)` int64, removed columns in order.
    """
    P = torch.linalg.inv(H)
    V = P @ C
    removed = torch.empty(steps, dtype=torch.int64, device=H.device)
    gone = torch.zeros(len(H), dtype=torch.bool, device=H.device)
    for step in range(steps):
        cost = V.square().sum(1) / P.diagonal()
        j = cost.masked_fill(gone, float("inf")).argmin()
        row, pivot = P[j].clone(), P[j, j].clone()
        V.addr_(row, V[j] / pivot, alpha=-1)
        P.addr_(row, row / pivot, alpha=-1)
        gone[j] = True
        P[j, j] = 1.0  # a removed column has no row left; its cost is masked
        removed[step] = j
    return removed


def bench_solver(
    sizes: Iterable[tuple[int, int]] = SIZES,
    *,
    keep: float = 0.5,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    problems: Mapping[str, tuple[Moments, torch.Tensor]] | None = None,
    backward_below: int = 4096,
    repeats: int = 3,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Run every method on synthetic problems and on given ones.

    Args:
        sizes: `(n, m)` of the synthetic problems, of which there are two of each size (`synthetic_moments`).
        keep: Fraction of columns kept.
        dtype: Of the synthetic moments.
        device: Where to run.
        problems: Further problems by name: moments and the weight `(n, m)`, single columns.
        backward_below: Largest n at which stochastic greedy, backward elimination and its yardstick of rank-one
            updates are run too; beyond, only greedy and its refinement are.
        repeats: Times are the least of this many runs (rank-one elimination runs once).
        seed: Of the synthetic problems and of stochastic greedy.

    Returns:
        A row per problem and method, of JSON types:

        - `problem`, `n`, `m`, `k`, `dtype`, `device`, `method`;
        - `seconds`, `cholesky_seconds` (of `torch.linalg.cholesky(H)`), `ratio_to_cholesky`;
        - `speedup_over_rank_one`, against rank-one backward elimination, or `None`;
        - `relative_error`: `1 - F / t`, shrinkage included, solved in float64;
        - `swaps`: exchanges made, 0 where there is no refinement.
    """
    rows: list[dict[str, Any]] = []
    for (n, m), alike in itertools.product(sizes, (False, True)):
        rows += _bench_problem(
            f"{'alike' if alike else 'synthetic'} {n}x{m}",
            *synthetic_moments(n, m, dtype=dtype, seed=seed, alike=alike),
            keep=keep,
            device=device,
            yardsticks=n <= backward_below,
            repeats=repeats,
            seed=seed,
        )
    for name, (moments, W) in (problems or {}).items():
        yardsticks = len(W) <= backward_below
        rows += _bench_problem(
            name, moments, W, keep=keep, device=device, yardsticks=yardsticks, repeats=repeats, seed=seed
        )
    return rows


def _bench_problem(name, moments, W, *, keep, device, yardsticks, repeats, seed) -> list[dict[str, Any]]:
    H, C, t = regularise(moments, W, _SHRINKAGE)
    objective = Objective(H.to(device), C.to(device))
    H, C = objective.H, objective.C
    n, m = C.shape
    k = max(1, round(keep * n))
    kept: dict[str, tuple[torch.Tensor, float, int]] = {}
    cholesky, _ = _timed(lambda: torch.linalg.cholesky(H), repeats, H.device)
    seconds, path = _timed(lambda: greedy(objective, k), repeats, H.device)
    kept["greedy"] = (path.kept(k), seconds, 0)
    if yardsticks:
        seconds, path = _timed(
            lambda: greedy(objective, k, epsilon=0.01, generator=torch.Generator().manual_seed(seed)),
            repeats,
            H.device,
        )
        kept["stochastic greedy"] = (path.kept(k), seconds, 0)
        seconds, path = _timed(lambda: backward(objective, k), repeats, H.device)
        kept["backward"] = (path.kept(k), seconds, 0)
    for start in ("greedy", "backward") if yardsticks else ("greedy",):
        seconds, chosen = _timed(partial(select, objective, k, Settings(method=start)), 1, H.device)
        kept[f"{start} + swaps"] = (chosen.kept, seconds, chosen.swaps)
    slow = None
    if yardsticks:
        slow, removed = _timed(lambda: rank_one_backward(H, C, n - k), 1, H.device)
        left = torch.ones(n, dtype=torch.bool, device=H.device)
        left[removed] = False
        kept["rank-one backward"] = (left.nonzero()[:, 0], slow, 0)
    return [
        {
            "problem": name,
            "n": n,
            "m": m,
            "k": k,
            "dtype": str(H.dtype).removeprefix("torch."),
            "device": str(H.device),
            "method": method,
            "seconds": seconds,
            "cholesky_seconds": cholesky,
            "ratio_to_cholesky": seconds / cholesky,
            "speedup_over_rank_one": None if slow is None else slow / seconds,
            "relative_error": 1 - objective.value(columns) / t if t > 0 else 0.0,
            "swaps": swaps,
        }
        for method, (columns, seconds, swaps) in kept.items()
    ]


def _timed(run: Callable[[], Any], repeats: int, device: torch.device) -> tuple[float, Any]:
    """The least wall time of a few runs, in seconds, and the last result."""
    best, result = math.inf, None
    for _ in range(repeats):
        start = time.perf_counter()
        result = run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best, result
