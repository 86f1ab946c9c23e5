"""Accuracy as a metric module of `evaluate`: the form in which the Hub keeps metrics, here on disk."""

from typing import Any

import datasets
import evaluate
from sklearn.metrics import accuracy_score


class Accuracy(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        number = datasets.Value("int64")
        return evaluate.MetricInfo(
            description="Fraction of the predicted classes that are the labels.",
            citation="",
            inputs_description="predictions, references: lists of class numbers.",
            features=datasets.Features({"predictions": number, "references": number}),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"accuracy": float(accuracy_score(references, predictions))}
