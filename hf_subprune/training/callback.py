"""Prune in `transformers.Trainer`: before training, after it, or step by step while it runs."""

import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, send_to_device
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from ..allocation.surveying import find
from ..config import PruneConfig
from ..data.reading import read_few
from ..data.trial import check_forward
from ..loading import carry
from ..models.intact import intact
from ..models.running import Batch, input_device, undisturbed
from ..models.session import check_prunable, own_forward, session
from ..pruning import prune
from ..report.report import PruneReport
from ..runs.workspace import Workspace
from .gradual import GradualPruning
from .schedules import Schedule

logger = logging.get_logger(__name__)

WHEN = ("end", "begin", "gradual")
_REFUSED = {
    DistributedType.FSDP: "FSDP",
    DistributedType.DEEPSPEED: "DeepSpeed",
    DistributedType.MEGATRON_LM: "Megatron-LM",
}


class SubpruneCallback(TrainerCallback, ExportableState):
    """Prunes the model that a `Trainer`, or a subclass of it, trains.

    ```python
    callback = SubpruneCallback(PruneConfig(keep=0.5), when="gradual")
    callback.attach(trainer)
    trainer.train()
    trainer.save_model()  # the small model
    ```

    `when` is one of

    - `"end"`: prune the trained model when training ends, after the best checkpoint was loaded if that was asked for.
    - `"begin"`: prune at once, then train the small model.
    - `"gradual"`: mask more and more units during training, as `schedule` says, each time with new weights for the
      consumers; the masked units stay zero, in the optimizer's statistics too. They are removed when training ends:
      checkpoints hold the masked model at full size, and `trainer.save_model()` after training the small one. With
      `load_best_model_at_end` only checkpoints since the last pruning step compete.

    A run resumes from a checkpoint in the middle of a schedule by itself. Pass the callback to `attach`, or in the
    trainer's `callbacks`: then `when="begin"` needs `data`, and figures reach `trainer.state.log_history` only, since
    a callback does not know its trainer.

    Args:
        config: What to keep and how.
        data: What to calibrate on, as for `prune`. Left out, samples of the train dataset (else the eval dataset) as
            the trainer's data collator makes them, labels dropped.
        when: `"end"`, `"begin"` or `"gradual"`.
        schedule: For `"gradual"`: a `Schedule`, a dict of its fields, or `"cubic"` or `"linear"`.

    Attributes:
        report: What was done; `None` before it was.

    Raises:
        ValueError: a value is not one of those listed. When training begins: FSDP, DeepSpeed, a quantized model or one
            with adapters, an optimizer that was built before the model was reshaped, data that does not fit or does
            not suffice, or a size that cannot be reached.
    """

    def __init__(
        self,
        config: PruneConfig | Mapping[str, Any] | None = None,
        data: Any = None,
        when: str = "end",
        schedule: Schedule | Mapping[str, Any] | str = "cubic",
    ) -> None:
        if when not in WHEN:
            raise ValueError(f"SubpruneCallback.when takes one of {', '.join(map(repr, WHEN))}; got {when!r}.")
        self.config = PruneConfig.of(config)
        self.data, self.when, self.schedule = data, when, Schedule.of(schedule)
        self.report: PruneReport | None = None
        self.has_data = data is not None
        self.progress: dict[str, Any] | None = None
        self._pruned: PreTrainedModel | None = None
        self._gradual: GradualPruning | None = None
        self._done = 0
        self._replaced: list[weakref.ref] = []
        self._trainer: Trainer | None = None

    def attach(self, trainer: Trainer) -> None:
        """Join a trainer and, with `when="begin"`, prune its model now.

        Raises:
            ValueError: as for the class; nothing was changed.
        """
        _check(trainer.args, trainer.model)
        if self.when == "begin":
            self._prune(trainer.model, trainer.processing_class, trainer.optimizer, lambda: _loader(trainer))
        self._trainer = trainer
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)

    def state(self) -> dict[str, Any]:
        """What a checkpoint stores: how to make the callback again, and how far the schedule is."""
        return {
            "args": {"config": self.config.to_dict(), "when": self.when, "schedule": self.schedule.to_dict()},
            "attributes": {"has_data": self.has_data, "progress": self._progress()},
        }

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse what cannot be pruned before any work; prune for `when="begin"`."""
        _check(args, kwargs["model"])
        if self.when == "begin":
            self._prune(kwargs["model"], kwargs["processing_class"], kwargs["optimizer"], lambda: None)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that the optimizer holds the model's parameters; go on with the schedule of a checkpoint."""
        model = kwargs["model"]
        _check(args, model)
        if self.has_data and self.data is None:
            raise ValueError(
                "The trainer has made SubpruneCallback anew from a checkpoint, which holds no `data`. Leave "
                "restore_callback_states_from_checkpoint=False: the callback restores itself."
            )
        if self.when == "begin" and self._pruned is not inner_model(model):
            raise ValueError(
                "when='begin' has not pruned the model that is to be trained: call callback.attach(trainer) before "
                "trainer.train(), pass the trainer a model, not model_init, and leave "
                "restore_callback_states_from_checkpoint=False, which would make the callback anew."
            )
        self._check_optimizer(kwargs["optimizer"])
        # A checkpoint saved without this callback has no entry, and the trainer fills entries without looking.
        callbacks: Any = state.stateful_callbacks
        stored = callbacks.setdefault(type(self).__name__, self.state())
        stored = stored[0] if isinstance(stored, list) else stored
        self.progress = stored["attributes"]["progress"]
        if self.when == "begin":
            self._log_report(state)
        if self.when == "end" and self._pruned is not inner_model(model):
            self._check_beforehand(inner_model(model), kwargs["processing_class"], _loader_of(kwargs))
        if self.when == "gradual" and not self._has_pruned(model):
            self._start(model, kwargs["processing_class"], kwargs["train_dataloader"])

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the pruning step that is due. Evaluation and checkpoints of a step come before the pruning."""
        due = self.schedule.due(state.global_step, state.max_steps)
        if self._gradual is None or due <= self._done:
            return
        gradual = self._gradual
        with own_forward(gradual.model):
            # Edits in training write values: a step that is interrupted takes all of them back.
            changed = intact(
                gradual.model, lambda: gradual.step(self.schedule.removed(due)), written=gradual.model.parameters()
            )
        self._done = due
        if not changed:
            return
        self._gradual.clear(kwargs["optimizer"].state)
        # A checkpoint with more units is no candidate for the best one of fewer.
        state.best_metric = state.best_model_checkpoint = state.best_global_step = None
        self._log(state, {"kept": self._gradual.kept_fraction, **self._gradual.drift})

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep the masked units at zero."""
        if self._gradual is not None:
            self._gradual.mask()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Prune the model, or remove the units that are masked by now."""
        model = kwargs["model"]
        if self.when == "end":
            self._prune(model, kwargs["processing_class"], None, lambda: _loader_of(kwargs))
            self._log_report(state)
        elif self._gradual is not None:
            if self._done < self.schedule.steps:
                logger.warning(
                    f"Training ended at step {state.global_step} of {state.max_steps}, after {self._done} of "
                    f"{self.schedule.steps} pruning steps: the others are made at once, with no training behind them."
                )
            with self._pruning(self._gradual.model):
                self.report = intact(
                    self._gradual.model, self._gradual.finish, written=self._gradual.model.parameters()
                )
                carry(self._gradual.model, self.report)
            self.progress = self._gradual = None
            self._log_report(state)

    def _prune(self, model: Any, processing_class: Any, optimizer: Any, loader: Callable[[], Any]) -> None:
        """Prune in one go; `loader` is called for a data loader when there is no `data`."""
        if self._has_pruned(model):
            return
        if optimizer is not None:
            raise ValueError(
                "when='begin' comes too late, the trainer has an optimizer that holds the unpruned parameters. Attach "
                "the callback before training, and leave the trainer's `optimizers` to the trainer; or prune first: "
                "hf_subprune.prune(model, ...)."
            )
        pretrained = inner_model(model)
        data = self._data(pretrained, loader())
        with self._pruning(pretrained):
            self.report = prune(pretrained, data, self.config, processing_class)

    def _check_beforehand(self, model: PreTrainedModel, processing_class: Any, loader: DataLoader | None) -> None:
        """Find out before the training what would make the pruning after it fail; the model and the data stay."""
        data = self._data(model, loader)
        if isinstance(data, Iterator):
            return  # what is read of it now would be missing then
        with undisturbed(model), session(model):
            samples = read_few(model, data, self.config, processing_class)
            if "experts" not in self.config.units:
                check_forward(samples)
                find(samples, [self.config], send_to_device(samples.probe, input_device(model)), Workspace())

    def _start(self, model: Any, processing_class: Any, loader: DataLoader) -> None:
        pretrained = inner_model(model)
        if self.progress is not None:
            self._done = self.progress["done"]
        with own_forward(pretrained):
            pruning = self.progress and self.progress["pruning"]
            data = self._data(pretrained, loader)
            self._gradual = GradualPruning(pretrained, data, self.config, processing_class, pruning)

    def _data(self, model: PreTrainedModel, loader: DataLoader | None) -> Any:
        if self.data is not None:
            return self.data
        if loader is None:
            raise ValueError(
                f"when={self.when!r} has nothing to calibrate on: pass `data`, or call callback.attach(trainer) on a "
                "trainer with a train or an eval dataset."
            )
        return collated(model, loader, self.config)

    def _progress(self) -> dict[str, Any] | None:
        if self._gradual is None:
            return self.progress
        return {"done": self._done, "pruning": self._gradual.state_dict()}

    def _check_optimizer(self, optimizer: Any) -> None:
        replaced = {id(parameter) for ref in self._replaced if (parameter := ref()) is not None}
        if any(id(parameter) in replaced for group in optimizer.param_groups for parameter in group["params"]):
            raise ValueError(
                "The trainer's optimizer holds parameters from before the pruning, which the model has no more: make "
                "a new trainer with the pruned model to train on."
            )

    def _has_pruned(self, model: Any) -> bool:
        done = self._pruned is inner_model(model)
        if done:
            logger.warning("SubpruneCallback has pruned this model before and leaves it as it is now.")
        return done

    @contextmanager
    def _pruning(self, model: PreTrainedModel) -> Iterator[None]:
        """Around surgery: notes which parameters it replaces."""
        before = list(model.parameters())
        with own_forward(model):
            yield
        after = {id(parameter) for parameter in model.parameters()}
        self._replaced = [weakref.ref(parameter) for parameter in before if id(parameter) not in after]
        self._pruned = model

    def _log_report(self, state: TrainerState) -> None:
        if self.report is not None:
            self._log(state, {"parameters": self.report.parameters.ratio, **self.report.drift})

    def _log(self, state: TrainerState, figures: Mapping[str, float]) -> None:
        figures = {f"subprune/{name}": value for name, value in figures.items() if name != "rows"}
        if self._trainer is not None:
            self._trainer.log(figures)
        else:
            state.log_history.append({**figures, "epoch": state.epoch, "step": state.global_step})


def inner_model(model: Any) -> Any:
    """The pretrained model that a trainer's model is or holds, such as the encoder of a `SentenceTransformer`."""
    if isinstance(model, PreTrainedModel) or hasattr(model, "peft_config"):
        return model
    return next((m for m in model.modules() if isinstance(m, PreTrainedModel)), model)


def collated(model: PreTrainedModel, loader: DataLoader, config: PruneConfig) -> list[Batch]:
    """Samples of a loader's dataset as the loader's collator makes batches of them.

    Where the collator prepares several texts of a sample, as `anchor_input_ids`, `positive_input_ids`, each of them
    gives a batch of its own; so does each sample where it joins samples into one row without padding.

    Args:
        model: Whose forward arguments are looked for.
        loader: Its dataset and collator are used; it is not advanced itself.
        config: `samples`, `held_out`, `batch_size` and `seed` are read.

    Returns:
        Forward arguments, labels included.

    Raises:
        ValueError: the batches hold no inputs of the model.
    """
    dataset, wanted = loader.dataset, config.samples + config.held_out
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        examples: Iterator[Any] = itertools.islice(iter(dataset), wanted)
    else:
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(config.seed))
        examples = (dataset[index] for index in order[:wanted].tolist())
    batches = []
    arguments, main = signature(type(model).forward).parameters, model.main_input_name
    with torch.random.fork_rng():  # collators that mask tokens at random must not change what training draws
        while group := list(itertools.islice(examples, config.batch_size)):
            batch = loader.collate_fn(group)
            prefixes = [name.removesuffix(main) for name in batch if name == main or name.endswith(f"_{main}")]
            if not prefixes:
                raise ValueError(
                    f"The trainer's batches hold {', '.join(map(repr, batch))}, of which none is the {main!r} of "
                    f"{type(model).__name__}: pass `data` to calibrate on."
                )
            apart = len(group) > 1 and len(batch[prefixes[0] + main]) == 1  # the collator joined them into one row
            for one in map(loader.collate_fn, ([example] for example in group)) if apart else [batch]:
                for prefix in prefixes:
                    batches.append({name: one[prefix + name] for name in arguments if prefix + name in one})
    return batches


def _check(args: TrainingArguments, model: Any) -> None:
    """Refuse distributed set-ups that keep parameters elsewhere, and models that `prune` refuses."""
    kind = PartialState().distributed_type
    name = _REFUSED.get(kind) or ("FSDP" if args.fsdp else "DeepSpeed" if args.deepspeed else None)
    if name is not None:
        raise ValueError(
            f"SubpruneCallback does not work with {name}, which keeps parameters where they cannot be reshaped: train "
            f"without it, or save the trained model and prune that: hf_subprune.prune(model, ...)."
        )
    check_prunable(inner_model(model))


def _loader_of(given: Mapping[str, Any]) -> DataLoader | None:
    """Of what the trainer tells its callbacks; one of a stream has no length, and so no truth value."""
    loaders = (given["train_dataloader"], given.get("eval_dataloader"))
    return next((loader for loader in loaders if loader is not None), None)


def _loader(trainer: Trainer) -> DataLoader | None:
    if trainer.train_dataset is not None:
        return trainer.get_train_dataloader()
    return trainer.get_eval_dataloader() if trainer.eval_dataset is not None else None
