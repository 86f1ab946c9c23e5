"""Tasks that a model is evaluated on before and after pruning: what it predicts for samples, and what is right."""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from transformers import PreTrainedModel

from ..config import PruneConfig
from ..data.datafiles import load_data
from ..data.reading import batch_all
from ..data.texts import TRANSCRIPTS
from ..models.running import Batch
from ..report.records import Change, Example, TaskMetric
from ..runs.stages import SCORING_ORIGINAL, SCORING_PRUNED, begin
from .metrics import RESAMPLES, Metric, as_metric, compare_scores, word_errors
from .scores import embed, log_losses, predicted_classes, written_tokens

Row = Mapping[str, Any]

# Samples of a transcription that are shown.
_SHOWN = 10


@dataclass(frozen=True, eq=False)
class Task(ABC):
    """A task on one data set.

    Args:
        rows: Samples as mappings of columns.
        processing_class: Tokenizer, image processor, feature extractor or processor of the model.
        columns: Those of the input; found by their type when left out.
        label: Column of what is right; found by its name, one of `label_names`, when left out.
        dataset: Name of the data, for the report.
        split: Of the data, for the report.
        max_length: Tokens that a text is truncated to.
        batch_size: Samples in a batch.

    Attributes:
        figure: Name of what `metric` computes.
        label_names: Names of columns of what is right, the first of which counts.
    """

    rows: Sequence[Row]
    processing_class: Any = None
    columns: tuple[str, ...] = ()
    label: str | None = None
    dataset: str = "data"
    split: str = ""
    max_length: int = 256
    batch_size: int = 16

    figure: ClassVar[str]
    label_names: ClassVar[Sequence[str]] = ("label", "labels", "score")

    def __post_init__(self) -> None:
        if not self.rows:
            raise ValueError(f"The data set {self.dataset} holds no samples to evaluate on.")
        wanted = [*self.columns, *([self.label] if self.label else [])]
        if missing := [name for name in wanted if name not in self.rows[0]]:
            raise ValueError(
                f"The data set {self.dataset} has no column {', '.join(map(repr, missing))}, "
                f"choose of {', '.join(map(repr, self.rows[0]))}."
            )

    @abstractmethod
    def hub_task(self, model: PreTrainedModel) -> str:
        """Name of the task on the Hub."""

    @abstractmethod
    def predict(self, model: PreTrainedModel) -> np.ndarray:
        """`(samples, ...)`: what the model says about every sample, in the order of the rows."""

    @abstractmethod
    def references(self, model: PreTrainedModel, predictions: np.ndarray) -> np.ndarray:
        """`(samples, ...)`: what is right, given the original model and its predictions."""

    @staticmethod
    @abstractmethod
    def metric(predictions: np.ndarray, references: np.ndarray) -> float:
        """The figure that is computed when no other metric is asked for."""

    def examples(self, before: np.ndarray, after: np.ndarray, references: np.ndarray) -> tuple[Example, ...]:
        """Samples to show, where predictions can be read: none for most tasks."""
        return ()

    def inputs(self) -> list[Any]:
        """The samples without their labels, as `prune` takes data."""
        names = self.columns or [name for name in self.rows[0] if name != self._label_column()]
        return [{name: row[name] for name in names} for row in self.rows]

    def _batches(self, model: PreTrainedModel, inputs: Sequence[Any]) -> Iterator[Batch]:
        return batch_all(model, inputs, self.processing_class, max_length=self.max_length, batch_size=self.batch_size)

    def _label_column(self) -> str | None:
        return self.label or next((name for name in self.label_names if name in self.rows[0]), None)

    def _labels(self) -> list[Any]:
        name = self._label_column()
        if name is None:
            raise ValueError(
                f"The data set {self.dataset} has no column named {', '.join(self.label_names[:-1])} or "
                f"{self.label_names[-1]}: name it (--label), of {', '.join(map(repr, self.rows[0]))}."
            )
        labels = [row[name] for row in self.rows]
        if missing := sum(label is None or label != label for label in labels):
            raise ValueError(
                f"{missing} of {len(labels)} samples of {self.dataset} have no value in column {name!r}: filter them "
                "out, or choose a split with labels."
            )
        return labels


class Classification(Task):
    """The most likely class of a text, an image or a sound, against its label: a number, or a name in the config."""

    figure = "accuracy"

    def hub_task(self, model: PreTrainedModel) -> str:
        kind = {"input_ids": "text", "pixel_values": "image"}.get(model.main_input_name, "audio")
        return f"{kind}-classification"

    def predict(self, model: PreTrainedModel) -> np.ndarray:
        return predicted_classes(model, self._batches(model, self.inputs())).numpy()

    def references(self, model: PreTrainedModel, predictions: np.ndarray) -> np.ndarray:
        labels = self._labels()
        known = model.config.label2id or {}
        if unknown := {label for label in labels if isinstance(label, str)} - set(known):
            raise ValueError(
                f"{type(model).__name__} knows no class {', '.join(map(repr, sorted(unknown)[:3]))}; its config has "
                f"{', '.join(map(repr, list(known)[:10]))}."
            )
        numbers = np.array([known[label] if isinstance(label, str) else label for label in labels])
        classes = model.config.num_labels or 0
        if outside := sorted(set(numbers[(numbers < 0) | (numbers >= classes)].tolist())):
            raise ValueError(
                f"The labels of {self.dataset} hold {', '.join(map(str, outside[:3]))}; {type(model).__name__} has "
                f"classes 0 to {classes - 1}: where labels are hidden (-1, as in test splits) choose another split, "
                "else a model that was trained for this data."
            )
        return numbers

    @staticmethod
    def metric(predictions: np.ndarray, references: np.ndarray) -> float:
        return float((predictions == references).mean())


class SentenceSimilarity(Task):
    """Semantic textual similarity: the cosine of two sentences' mean-pooled embeddings, against a score."""

    figure = "spearmanr"

    def hub_task(self, model: PreTrainedModel) -> str:
        return "sentence-similarity"

    def predict(self, model: PreTrainedModel) -> np.ndarray:
        first, second = (embed(model, self._batches(model, sentences)) for sentences in self._pairs())
        return (first * second).sum(1).numpy()

    def references(self, model: PreTrainedModel, predictions: np.ndarray) -> np.ndarray:
        scores = np.array(self._labels(), dtype=float)
        if len(set(scores.tolist())) < 2:
            raise ValueError(
                f"All scores of {self.dataset} are {scores[0]:g}, so that nothing can be correlated with them: where "
                "scores are hidden, as in test splits, choose another split."
            )
        return scores

    @staticmethod
    def metric(predictions: np.ndarray, references: np.ndarray) -> float:
        from scipy.stats import spearmanr

        return float(spearmanr(predictions, references).statistic)

    def inputs(self) -> list[Any]:
        return [sentence for sentences in self._pairs() for sentence in sentences]

    def _pairs(self) -> tuple[list[str], list[str]]:
        names = self.columns or [name for name, value in self.rows[0].items() if isinstance(value, str)]
        if len(names) != 2:
            raise ValueError(
                f"Sentence similarity needs two columns of text, found {', '.join(map(repr, names)) or 'none'} in "
                f"{self.dataset}: name them (--column first,second)."
            )
        return tuple([row[name] for row in self.rows] for name in names)  # type: ignore[return-value]


class Perplexity(Task):
    """How well a causal language model predicts every token of the texts but each first one."""

    figure = "perplexity"

    def hub_task(self, model: PreTrainedModel) -> str:
        return "text-generation"

    def predict(self, model: PreTrainedModel) -> np.ndarray:
        """`(samples, 2)`: negative log-likelihood in nats, and number of tokens it is the sum over."""
        return log_losses(model, self._batches(model, self.inputs())).numpy()

    def references(self, model: PreTrainedModel, predictions: np.ndarray) -> np.ndarray:
        return predictions[:, 1]

    @staticmethod
    def metric(predictions: np.ndarray, references: np.ndarray) -> float:
        return math.exp(predictions[:, 0].sum() / references.sum())


class EmbeddingDrift(Task):
    """The cosine between the two models' mean-pooled embeddings of a sample; no labels are needed."""

    figure = "embedding_cosine"

    def hub_task(self, model: PreTrainedModel) -> str:
        return "feature-extraction"

    def predict(self, model: PreTrainedModel) -> np.ndarray:
        return embed(model, self._batches(model, self.inputs())).numpy()

    def references(self, model: PreTrainedModel, predictions: np.ndarray) -> np.ndarray:
        return predictions

    @staticmethod
    def metric(predictions: np.ndarray, references: np.ndarray) -> float:
        return float((predictions * references).sum(1).mean())


class Transcription(Task):
    """Word errors in what a model writes down of a sound or an image, against the text of it.

    Case, punctuation and what stands in brackets do not count. Where the figure is 0.1, a tenth of the words was left
    out, replaced or added.
    """

    figure = "wer"
    label_names = TRANSCRIPTS

    def hub_task(self, model: PreTrainedModel) -> str:
        return "image-to-text" if model.main_input_name == "pixel_values" else "automatic-speech-recognition"

    def predict(self, model: PreTrainedModel) -> np.ndarray:
        """`(samples,)` of text."""
        tokenizer = getattr(self.processing_class, "tokenizer", None)
        if tokenizer is None or model.main_input_name == "input_ids":
            raise ValueError(
                f"{type(model).__name__} with {type(self.processing_class).__name__} writes down no sound or image: "
                "transcription takes a model that does, with the processor that was saved with it."
            )
        ids = written_tokens(model, self._batches(model, super().inputs()))
        return np.array([text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)], dtype=object)

    def references(self, model: PreTrainedModel, predictions: np.ndarray) -> np.ndarray:
        return np.array(self._labels(), dtype=object)

    @staticmethod
    def metric(predictions: np.ndarray, references: np.ndarray) -> float:
        pairs = zip(references.tolist(), predictions.tolist(), strict=True)
        errors, words = np.array([word_errors(reference, prediction) for reference, prediction in pairs]).sum(0)
        return float(errors / max(words, 1))

    def inputs(self) -> list[Any]:
        """The samples with their texts, which decoders read."""
        return list(self.rows)

    def examples(self, before: np.ndarray, after: np.ndarray, references: np.ndarray) -> tuple[Example, ...]:
        return tuple(zip(references[:_SHOWN].tolist(), before[:_SHOWN].tolist(), after[:_SHOWN].tolist(), strict=True))


TASKS: dict[str, type[Task]] = {
    "classification": Classification,
    "sts": SentenceSimilarity,
    "perplexity": Perplexity,
    "embedding-drift": EmbeddingDrift,
    "transcription": Transcription,
}
"""Every task by its name on the command line."""


class Trial:
    """A task and a metric on the original model, to compare pruned ones with.

    Args:
        task: What is predicted.
        original: Is run once, here, and not kept.
        metric: From `metrics.load_metric`; that of the task when left out.

    Raises:
        ValueError: the model cannot do the task, or the data lacks what it needs.
    """

    def __init__(self, task: Task, original: PreTrainedModel, metric: Metric | None = None) -> None:
        self.task = task
        self.metric = metric or as_metric(task.metric, task.figure)
        self.hub_task = task.hub_task(original)
        begin(SCORING_ORIGINAL)
        self.before = task.predict(original)
        self.references = task.references(original, self.before)

    def score(self, pruned: PreTrainedModel, resamples: int = RESAMPLES, seed: int = 0) -> tuple[TaskMetric, ...]:
        """Every figure of the metric before and after, with 95% intervals of the paired bootstrap.

        Args:
            pruned: The model to compare.
            resamples: As in `metrics.compare_scores`.
            seed: As in `metrics.compare_scores`.
        """
        begin(SCORING_PRUNED)
        after = self.task.predict(pruned)
        scores = compare_scores(self.metric, self.before, after, self.references, resamples=resamples, seed=seed)
        examples = self.task.examples(self.before, after, self.references)
        return tuple(
            TaskMetric(
                name=name,
                task=self.hub_task,
                dataset=self.task.dataset,
                split=self.task.split,
                samples=len(self.references),
                value=Change(found.before, found.after),
                before_interval=found.before_interval,
                after_interval=found.after_interval,
                change_interval=found.change_interval,
                examples=examples,
            )
            for name, found in scores.items()
        )


def load_task(
    name: str,
    source: str,
    processing_class: Any,
    config: PruneConfig | None = None,
    *,
    split: str | None = None,
    column: str | None = None,
    label: str | None = None,
    samples: int | None = None,
) -> Task:
    """A task on a file, a folder of images or sounds, or a data set of the Hub.

    The classes of images and sounds are the names of the folders that they lie in.

    Args:
        name: Of `TASKS`.
        source: As in `datafiles.load_data`.
        processing_class: Of the model.
        config: Its `max_length`, `batch_size` and `seed` are used; the default one when left out.
        split: Of the data set.
        column: Of the input, several with commas between them; found when left out.
        label: Column of labels; found when left out.
        samples: Number of samples, drawn at random; all of them when left out. Those with a blank text are passed
            over.

    Raises:
        ValueError: there is no such task, or no such column.
        FileNotFoundError, ValueError: as `datafiles.load_data`.
    """
    if name not in TASKS:
        raise ValueError(f"There is no task {name!r}, choose one of {', '.join(map(repr, TASKS))}.")
    config = config or PruneConfig()
    data = load_data(source, split=split, labels=TASKS[name] is Classification)
    if samples is not None:
        data = data.shuffle(seed=config.seed, buffer_size=10 * samples)
    rows = (row for row in data if not any(isinstance(value, str) and not value.strip() for value in row.values()))
    return TASKS[name](
        list(itertools.islice(rows, samples)),
        processing_class,
        columns=tuple(part.strip() for part in column.split(",")) if column else (),
        label=label,
        dataset=Path(source).stem if Path(source).exists() else source,
        split=split or "",
        max_length=config.max_length,
        batch_size=config.batch_size,
    )
