"""Metrics by name, and intervals of what they say."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from hf_subprune.evaluation.metrics import as_metric, compare_scores, load_metric

MODULE = """
import datasets
import evaluate


class Hits(evaluate.Metric):
    def _info(self):
        number = datasets.Value("int64")
        return evaluate.MetricInfo(
            description="", citation="", inputs_description="",
            features=datasets.Features({"predictions": number, "references": number}),
        )

    def _compute(self, predictions, references):
        hits = [p == r for p, r in zip(predictions, references)]
        return {"hits": sum(hits), "rate": sum(hits) / len(hits), "each": hits}
"""

PREDICTIONS, REFERENCES = np.array([1, 0, 1, 1]), np.array([1, 0, 0, 1])


def test_functions_get_their_arguments_by_name_where_they_have_them():
    assert load_metric("sklearn.metrics:recall_score")(PREDICTIONS, REFERENCES) == {"recall_score": 1.0}
    assert load_metric("sklearn.metrics:precision_score")(PREDICTIONS, REFERENCES) == {"precision_score": 2 / 3}
    assert as_metric(lambda references, predictions: predictions.sum() - 2 * references.sum(), "x")(
        PREDICTIONS, REFERENCES
    ) == {"x": -1.0}
    assert as_metric(lambda a, b: a.sum() - 2 * b.sum(), "x")(PREDICTIONS, REFERENCES) == {"x": -1.0}


def test_the_statistic_of_a_scipy_result_is_the_figure():
    found = load_metric("scipy.stats:spearmanr")(PREDICTIONS, REFERENCES)
    assert found == {"spearmanr": spearmanr(PREDICTIONS, REFERENCES).statistic}


def test_a_function_beside_the_caller_is_found(tmp_path, monkeypatch):
    (tmp_path / "my_metrics.py").write_text("def mean(predictions, references):\n    return {'mean': 1, 'all': []}\n")
    monkeypatch.chdir(tmp_path)
    assert load_metric("my_metrics:mean")(PREDICTIONS, REFERENCES) == {"mean": 1.0}


def test_a_metric_module_of_evaluate_is_loaded_from_a_file(tmp_path):
    pytest.importorskip("evaluate")
    (tmp_path / "hits.py").write_text(MODULE)
    metric = load_metric(str(tmp_path / "hits.py"))
    assert metric(PREDICTIONS, REFERENCES) == {"hits": 3.0, "rate": 0.75}
    assert metric(REFERENCES, REFERENCES) == {"hits": 4.0, "rate": 1.0}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("sklearn.metrics:nothing", "no function 'nothing' in a module 'sklearn.metrics'"),
        ("nowhere.at_all:f1", "no function 'f1' in a module 'nowhere.at_all'"),
        ("accuracy", "needs a network. Without one, give the path"),
    ],
)
def test_a_metric_that_is_not_there_says_what_to_give(name, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=said):
        load_metric(name)


def test_a_metric_without_numbers_is_refused():
    with pytest.raises(ValueError, match="curve gives no number"):
        as_metric(lambda a, b: {"curve": [1, 2]}, "curve")(PREDICTIONS, REFERENCES)


# Intervals


def accuracy(predictions, references):
    return (predictions == references).mean()


def test_intervals_of_a_mean_are_those_of_its_standard_error():
    generator = np.random.default_rng(0)
    references = np.zeros(400)
    before, after = (generator.random(400) > rate for rate in (0.9, 0.8))
    scores = compare_scores(as_metric(accuracy, "accuracy"), before, after, references)["accuracy"]
    assert (scores.before, scores.after) == (1 - before.mean(), 1 - after.mean())
    for value, (low, high) in ((scores.before, scores.before_interval), (scores.after, scores.after_interval)):
        half = 1.96 * np.sqrt(value * (1 - value) / 400)
        assert (low, high) == pytest.approx((value - half, value + half), abs=0.15 * half)


def test_the_change_is_paired():
    """Two models that err on the same samples but one differ surely, however uncertain each one's figure is."""
    references = np.zeros(200)
    before = np.arange(200) < 100
    after = np.arange(200) < 110
    scores = compare_scores(as_metric(accuracy, "accuracy"), before, after, references)["accuracy"]
    assert scores.before_interval[1] - scores.before_interval[0] > 0.1
    assert -0.09 < scores.change_interval[0] < scores.change_interval[1] < -0.02
    same = compare_scores(as_metric(accuracy, "accuracy"), before, before, references)["accuracy"]
    assert same.change_interval == (0, 0)


def test_every_figure_of_a_metric_has_its_own_interval():
    def two(predictions, references):
        return {"sum": predictions.sum(), "mean": predictions.mean()}

    scores = compare_scores(as_metric(two, "two"), PREDICTIONS, REFERENCES, REFERENCES, resamples=50)
    assert list(scores) == ["sum", "mean"]
    assert scores["sum"].before_interval == pytest.approx([4 * end for end in scores["mean"].before_interval])
    again = compare_scores(as_metric(two, "two"), PREDICTIONS, REFERENCES, REFERENCES, resamples=50)
    assert scores == again


@pytest.mark.parametrize("count", [3, 1])
def test_as_many_predictions_as_references(count):
    with pytest.raises(ValueError, match="needs two samples or more"):
        compare_scores(as_metric(accuracy, "a"), PREDICTIONS, PREDICTIONS[:count], REFERENCES[:count])
