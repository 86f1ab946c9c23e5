"""Metrics of predictions: those of `evaluate`, any function by its Python path, and how sure a figure is."""

import importlib
import inspect
import numbers
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from transformers.models.whisper.english_normalizer import BasicTextNormalizer

Metric = Callable[[np.ndarray, np.ndarray], dict[str, float]]
"""Predictions and references, one row per sample each, to figures by name."""

RESAMPLES = 1000
_LEVEL = 0.95


@dataclass(frozen=True)
class Scores:
    """A figure of two models on the same samples, with 95% confidence intervals, each `(low, high)`.

    Args:
        before: Of the first model's predictions.
        after: Of the second one's.
        before_interval: Of the first figure.
        after_interval: Of the second figure.
        change_interval: Of `after - before`, both on the same resampled samples.
    """

    before: float
    after: float
    before_interval: tuple[float, float]
    after_interval: tuple[float, float]
    change_interval: tuple[float, float]


def load_metric(name: str) -> Metric:
    """Find a metric.

    Args:
        name: `"package.module:function"`, a function of predictions and references that returns a number or a dict
            of numbers (scikit-learn's and SciPy's are such); a folder or `.py` file with a metric module of
            `evaluate`; or the id of a metric that `evaluate.load` fetches from the Hub, which needs a network.

    Raises:
        ValueError: the function or the metric does not exist, or cannot be fetched.
        ImportError: `evaluate` is needed and not installed.
    """
    if ":" in name:
        return _from_function(name)
    return _from_evaluate(name)


def as_metric(function: Callable[..., Any], name: str) -> Metric:
    """A function as a metric; `name` is that of its figure unless it names its figures itself.

    It is called with `predictions=` and `references=`, or `y_pred=` and `y_true=`, if these are its parameters, else
    with both by position, predictions first.
    """
    parameters = inspect.signature(function).parameters
    names = next(
        (pair for pair in (("predictions", "references"), ("y_pred", "y_true")) if set(pair) <= set(parameters)), None
    )

    def metric(predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        if names is None:
            return _figures(function(predictions, references), name)
        return _figures(function(**dict(zip(names, (predictions, references), strict=True))), name)

    return metric


@cache
def word_errors(reference: str, prediction: str) -> tuple[int, int]:
    """Words that are left out, replaced or added in a prediction, and words of the reference.

    Case, punctuation and what stands in brackets are left out of account, as Whisper's authors do.

    Raises:
        ImportError: jiwer is not installed.
    """
    try:
        from jiwer import process_words
    except ImportError as error:
        raise ImportError("Word errors need jiwer: pip install 'hf_subprune[speech]'") from error
    normal = BasicTextNormalizer()
    found = process_words(normal(reference).strip(), normal(prediction).strip())
    errors = found.substitutions + found.deletions + found.insertions
    return errors, found.hits + found.substitutions + found.deletions


def _from_function(name: str) -> Metric:
    module_name, _, function_name = name.partition(":")
    sys.path.insert(0, "")  # a module beside the caller, as `python -m` finds it
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"There is no function {function_name!r} in a module {module_name!r}: {error}.") from error
    finally:
        sys.path.pop(0)
    return as_metric(function, function_name)


def _from_evaluate(name: str) -> Metric:
    try:
        import evaluate
    except ImportError as error:
        raise ImportError("Metrics by name need evaluate: pip install 'hf_subprune[evaluate]'") from error
    try:
        module = evaluate.load(name, keep_in_memory=True)
    except (OSError, ImportError) as error:
        if Path(name).exists():
            raise ValueError(f"The metric module {name} cannot be loaded: {error}") from error
        raise ValueError(
            f"There is no metric module {name!r} here, and `evaluate` could not fetch one of that name from the Hub, "
            "which needs a network. Without one, give the path of a metric module, or a function such as "
            f"'sklearn.metrics:accuracy_score'. ({error})"
        ) from error
    return lambda predictions, references: _figures(
        module.compute(predictions=predictions, references=references), module.name
    )


def _figures(result: Any, name: str) -> dict[str, float]:
    """A metric's result as figures by name; what is no number (a curve, a table) is left out.

    Raises:
        ValueError: there is no number in it.
    """
    if not isinstance(result, Mapping):
        result = {name: getattr(result, "statistic", result)}  # SciPy's results hold a p-value too
    figures = {key: float(value) for key, value in result.items() if isinstance(value, (numbers.Real, np.number))}
    if not figures:
        raise ValueError(f"The metric {name} gives no number, but {result}.")
    return figures


def compare_scores(
    metric: Metric,
    before: np.ndarray,
    after: np.ndarray,
    references: np.ndarray,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Scores]:
    """A metric of two models' predictions, with intervals by the paired percentile bootstrap over samples.

    Args:
        metric: From `load_metric` or `as_metric`.
        before: `(samples, ...)`.
        after: `(samples, ...)`.
        references: `(samples, ...)`.
        resamples: Number of times that samples are drawn with replacement; both models get the same ones.
        seed: Of the drawing.

    Raises:
        ValueError: there are fewer than two samples, or not as many predictions as references.
        ImportError: SciPy is not installed.
    """
    if not len(before) == len(after) == len(references) or len(references) < 2:
        raise ValueError(
            f"A comparison needs two samples or more, and as many predictions as references; got {len(before)} and "
            f"{len(after)} predictions, {len(references)} references."
        )
    try:
        from scipy.stats import bootstrap
    except ImportError as error:
        raise ImportError("Confidence intervals need SciPy: pip install 'hf_subprune[evaluate]'") from error

    figures = metric(before, references), metric(after, references)
    names = list(figures[0])

    def statistic(drawn: np.ndarray, axis: int) -> np.ndarray:
        """`(3, figures, resamples)` from `(resamples, samples)` or `(samples,)` indices."""
        rows = []
        for index in np.atleast_2d(drawn).astype(int):
            old, new = (np.array(list(metric(x[index], references[index]).values())) for x in (before, after))
            rows.append(np.stack([old, new, new - old]))
        found = np.stack(rows, axis=-1)
        return found if drawn.ndim > 1 else found[..., 0]

    interval = bootstrap(
        (np.arange(len(references)),),
        statistic,
        vectorized=True,
        n_resamples=resamples,
        confidence_level=_LEVEL,
        method="percentile",
        rng=seed,
    ).confidence_interval
    ends = np.stack([interval.low, interval.high], axis=-1).tolist()
    return {
        name: Scores(figures[0][name], figures[1][name], *(tuple(ends[which][i]) for which in range(3)))
        for i, name in enumerate(names)
    }
