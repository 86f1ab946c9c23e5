"""Pruning in `Trainer`: before, after and during training."""

import copy
import json

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from same import assert_same_weights
from tiny import tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithFlattening,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_subprune.config import PruneConfig
from hf_subprune.training.callback import SubpruneCallback, collated
from hf_subprune.training.schedules import Schedule

CONFIG = PruneConfig(samples=12, held_out=6, batch_size=6, budget="uniform")
SCHEDULE = Schedule("cubic", start=0.0, end=0.5, steps=3)


def dataset(rows=24, length=6, seq2seq=False):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 120, (rows, length), generator=generator)
    labels = ids if seq2seq else ids[:, 0] % 2
    return Dataset.from_dict(
        {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist(), "labels": labels.tolist()}
    )


def make_trainer(folder, model=None, callbacks=(), data=None, **arguments):
    arguments = {"max_steps": 8, "per_device_train_batch_size": 4, "learning_rate": 1e-3, **arguments}
    settings = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "logging_steps": 2, "save_strategy": "no"}
    data = data or dataset()
    return Trainer(
        model or tiny("bert", num_hidden_layers=1),
        TrainingArguments(str(folder), **{**settings, **arguments}),
        train_dataset=data,
        eval_dataset=data,
        callbacks=list(callbacks),
    )


def gradual(**changes):
    return SubpruneCallback(CONFIG, when="gradual", schedule=SCHEDULE, **changes)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 9)[None]).logits


class Watch(TrainerCallback):
    """What the model is like when training begins, at each step's end, and what was logged."""

    def __init__(self):
        self.logged, self.zeros, self.parameters = [], [], []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.at_begin = model.num_parameters()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        weight = model.bert.encoder.layer[0].output.dense.weight
        self.zeros.append(int((weight == 0).all(0).sum()))
        self.parameters.append(model.num_parameters())

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logged.append(logs)


@pytest.mark.parametrize("when", ["begin", "end", "gradual"])
def test_the_saved_model_is_the_pruned_one(tmp_path, when):
    watch = Watch()
    trainer = make_trainer(tmp_path, callbacks=[watch])
    full = trainer.model.num_parameters()
    callback = SubpruneCallback(CONFIG, when=when, schedule=SCHEDULE)
    callback.attach(trainer)
    trainer.train()
    trainer.save_model()
    small = trainer.model.num_parameters()
    assert small < full
    assert watch.parameters == [small if when == "begin" else full] * 8
    assert callback.report.parameters.after == small
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert_same_weights(again, trainer.model)
    torch.testing.assert_close(logits(again), logits(trainer.model))
    assert trainer.evaluate()["eval_loss"] > 0


@pytest.mark.parametrize("when", ["begin", "end", "gradual"])
def test_training_moves_the_weights_that_are_kept(tmp_path, when):
    trainer = make_trainer(tmp_path)
    before = trainer.model.bert.embeddings.word_embeddings.weight.detach().clone()
    SubpruneCallback(CONFIG, when=when, schedule=SCHEDULE).attach(trainer)
    if when == "begin":
        before = trainer.model.bert.encoder.layer[0].output.dense.weight.detach().clone()
    trainer.train()
    after = trainer.model.bert.encoder.layer[0].output.dense.weight
    if when != "begin":
        after = trainer.model.bert.embeddings.word_embeddings.weight
    assert not torch.equal(before, after)


def test_masks_grow_with_the_schedule_and_hold_against_the_optimizer(tmp_path):
    watch = Watch()
    trainer = make_trainer(tmp_path, callbacks=[watch], weight_decay=0.1)
    gradual().attach(trainer)
    trainer.train()
    removed = [round(28 * SCHEDULE.removed(SCHEDULE.due(step, 8))) for step in range(8)]
    assert watch.zeros == removed
    assert removed[0] == 0 and removed[-1] == 28


def test_figures_reach_the_trainers_loggers(tmp_path):
    watch = Watch()
    trainer = make_trainer(tmp_path, callbacks=[watch])
    gradual().attach(trainer)
    trainer.train()
    steps = [logs for logs in watch.logged if "subprune/kept" in logs]
    kept = [logs["subprune/kept"] for logs in steps]
    assert kept == sorted(kept, reverse=True)
    assert kept[-1] == pytest.approx(0.5)
    assert all(logs["subprune/relative_error"] > 0 for logs in steps)
    assert any("subprune/parameters" in logs for logs in watch.logged)
    assert sum("loss" in logs for logs in watch.logged) == 4, "the trainer's own logs are all there"
    assert [entry for entry in trainer.state.log_history if "subprune/kept" in entry]


@pytest.mark.parametrize(
    "arguments",
    [
        {"gradient_accumulation_steps": 2},
        {"gradient_checkpointing": True},
        {"bf16": True},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_trainer_settings(tmp_path, arguments):
    watch = Watch()
    trainer = make_trainer(tmp_path, callbacks=[watch], **arguments)
    callback = gradual()
    callback.attach(trainer)
    trainer.train()
    assert watch.zeros[-1] == 28
    assert callback.report.parameters.after == trainer.model.num_parameters()
    trainer.save_model()
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert_same_weights(again, trainer.model)
    tolerance = 0.02 if "bf16" in arguments else 1e-5  # the trainer's own forward stays under autocast
    torch.testing.assert_close(logits(again), logits(trainer.model), rtol=0, atol=tolerance)


def test_bfloat16_weights(tmp_path):
    trainer = make_trainer(tmp_path, tiny("bert", num_hidden_layers=1).bfloat16())
    callback = gradual()
    callback.attach(trainer)
    trainer.train()
    assert callback.report.parameters.ratio < 1
    assert {p.dtype for p in trainer.model.parameters()} == {torch.bfloat16}


@pytest.mark.slow
def test_resuming_in_the_middle_of_the_schedule_changes_nothing(tmp_path):
    model = tiny("bert", num_hidden_layers=1)
    arguments = {"save_strategy": "steps", "save_steps": 3}
    whole = make_trainer(tmp_path / "whole", copy.deepcopy(model), [gradual()], **arguments)
    whole.train()

    state = json.loads((tmp_path / "whole" / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["SubpruneCallback"]["attributes"]["progress"]["done"] == 1

    callback = gradual()
    resumed = make_trainer(tmp_path / "resumed", copy.deepcopy(model), [callback], **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    torch.testing.assert_close(logits(resumed.model), logits(whole.model))
    assert [b.kept_units for b in callback.report.blocks] == [
        b.kept_units for b in whole.callback_handler.pop_callback(SubpruneCallback).report.blocks
    ]


def test_resuming_from_a_checkpoint_made_without_the_callback(tmp_path):
    arguments = {"save_strategy": "steps", "save_steps": 2}
    make_trainer(tmp_path, max_steps=2, **arguments).train()
    callback = gradual()
    trainer = make_trainer(tmp_path, callbacks=[callback], **arguments)
    trainer.train(resume_from_checkpoint=True)
    assert callback.report.parameters.ratio < 1


def test_callbacks_that_the_trainer_makes_anew_go_on(tmp_path):
    arguments = {"save_strategy": "steps", "save_steps": 3, "restore_callback_states_from_checkpoint": True}
    make_trainer(tmp_path, callbacks=[gradual()], **arguments).train()
    trainer = make_trainer(tmp_path, callbacks=[gradual()], **arguments)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert trainer.callback_handler.pop_callback(SubpruneCallback).report.parameters.ratio < 1


def test_callbacks_that_the_trainer_makes_anew_have_no_data(tmp_path):
    data = [dataset().with_format("torch")[:18]]
    arguments = {"save_strategy": "steps", "save_steps": 3, "restore_callback_states_from_checkpoint": True}
    make_trainer(tmp_path, callbacks=[gradual(data=data)], **arguments).train()
    trainer = make_trainer(tmp_path, callbacks=[gradual(data=data)], **arguments)
    with pytest.raises(ValueError, match="restore_callback_states_from_checkpoint=False"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


@pytest.mark.parametrize("when", ["end", "gradual"])
def test_the_best_checkpoint_is_loaded_and_then_pruned(tmp_path, when):
    class Worse(TrainerCallback):
        """The first evaluation is the best one, and the next best follows the end of the schedule."""

        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            metrics["eval_score"] = {2: 9.0, 4: 1.0, 6: 5.0, 8: 2.0}[state.global_step]

    trainer = make_trainer(
        tmp_path,
        callbacks=[Worse()],
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
    )
    callback = SubpruneCallback(CONFIG, when=when, schedule=SCHEDULE)
    callback.attach(trainer)
    trainer.train()
    best = 2 if when == "end" else 6
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / f"checkpoint-{best}")
    assert torch.equal(
        trainer.model.bert.embeddings.word_embeddings.weight, saved.bert.embeddings.word_embeddings.weight
    )
    assert trainer.model.num_parameters() == callback.report.parameters.after < saved.num_parameters()
    if when == "gradual":
        assert torch.allclose(logits(saved), logits(trainer.model), atol=1e-5)


def test_training_that_stops_early_is_pruned_to_the_end(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    trainer = make_trainer(tmp_path, callbacks=[Stop()])
    callback = gradual()
    callback.attach(trainer)
    trainer.train()
    mlp = next(b for b in callback.report.blocks if b.kind == "mlp")
    assert (mlp.units_before, mlp.units_after) == (56, 28)


def test_given_to_the_trainer_it_prunes_on_init_and_logs_to_the_history(tmp_path):
    data = [dataset().remove_columns("labels").with_format("torch")[:18]]
    callback = SubpruneCallback(CONFIG, data, when="begin")
    trainer = make_trainer(tmp_path, callbacks=[callback])
    assert callback.report.parameters.after == trainer.model.num_parameters()
    trainer.train()
    assert any("subprune/parameters" in entry for entry in trainer.state.log_history)


def test_begin_needs_data_where_there_is_no_trainer(tmp_path):
    with pytest.raises(ValueError, match=r"pass `data`, or call callback.attach\(trainer\)"):
        make_trainer(tmp_path, callbacks=[SubpruneCallback(CONFIG, when="begin")])


def test_begin_refuses_an_optimizer_that_exists(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.create_optimizer()
    before = trainer.model.num_parameters()
    with pytest.raises(ValueError, match="comes too late"):
        SubpruneCallback(CONFIG, when="begin").attach(trainer)
    assert trainer.model.num_parameters() == before


def test_begin_added_late_is_refused(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.add_callback(SubpruneCallback(CONFIG, when="begin"))
    with pytest.raises(ValueError, match=r"call callback.attach\(trainer\) before"):
        trainer.train()


def test_an_optimizer_from_before_the_pruning_is_refused(tmp_path):
    trainer = make_trainer(tmp_path)
    SubpruneCallback(CONFIG).attach(trainer)
    trainer.train()
    with pytest.raises(ValueError, match="make a new trainer"):
        trainer.train()


def test_a_new_trainer_trains_the_pruned_model_on_without_pruning_again(tmp_path):
    callback = gradual()
    trainer = make_trainer(tmp_path, callbacks=[callback])
    trainer.train()
    report, parameters = callback.report, trainer.model.num_parameters()
    again = make_trainer(tmp_path, trainer.model, [callback])
    again.train()
    assert again.model.num_parameters() == parameters
    assert callback.report is report


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_sharded_training_is_refused(tmp_path, monkeypatch, kind):
    trainer = make_trainer(tmp_path)
    monkeypatch.setitem(PartialState._shared_state, "distributed_type", kind)
    with pytest.raises(ValueError, match=f"does not work with {'FSDP' if kind == 'FSDP' else 'DeepSpeed'}"):
        gradual().attach(trainer)


def test_quantized_models_are_refused(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.model.is_quantized = True
    with pytest.raises(ValueError, match="is quantized"):
        gradual().attach(trainer)


def test_models_with_adapters_are_refused(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny("bert", num_hidden_layers=1), peft.LoraConfig(target_modules=["query"]))
    with pytest.raises(ValueError, match="merge them first"):
        make_trainer(tmp_path, model, [gradual()])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"when": "sometimes"}, "'end', 'begin', 'gradual'; got 'sometimes'"),
        ({"schedule": "cosine"}, "'cubic', 'linear'; got 'cosine'"),
        ({"config": {"keeps": 0.5}}, "no field 'keeps'"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SubpruneCallback(**arguments)


def test_the_state_makes_an_equal_callback():
    callback = gradual()
    again = SubpruneCallback.from_state(json.loads(json.dumps(callback.state())))
    assert again.state() == callback.state()
    assert (again.config, again.schedule, again.when) == (CONFIG, SCHEDULE, "gradual")


def test_seq2seq_trainer(tmp_path):
    data = dataset(seq2seq=True)
    trainer = Seq2SeqTrainer(
        tiny("t5", num_layers=1),
        Seq2SeqTrainingArguments(
            str(tmp_path), max_steps=4, report_to=[], disable_tqdm=True, use_cpu=True, save_strategy="no"
        ),
        train_dataset=data,
    )
    callback = gradual()
    callback.attach(trainer)
    trainer.train()
    assert callback.report.parameters.after == trainer.model.num_parameters() < callback.report.parameters.before


TEXTS = [" ".join(str((7 * i + j * j) % 90) for j in range(6)) for i in range(24)]


def numbers_tokenizer():
    vocabulary = {"[PAD]": 0, "[UNK]": 1, "[EOS]": 2, **{str(i): i for i in range(3, 90)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]")


@pytest.mark.slow
def test_the_trainer_of_sentence_transformers(tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    losses = pytest.importorskip("sentence_transformers.losses")
    tiny("bert", num_hidden_layers=1).bert.save_pretrained(tmp_path / "encoder")
    numbers_tokenizer().save_pretrained(tmp_path / "encoder")
    model = sentence_transformers.SentenceTransformer(str(tmp_path / "encoder"), device="cpu")
    trainer = sentence_transformers.SentenceTransformerTrainer(
        model,
        sentence_transformers.SentenceTransformerTrainingArguments(
            str(tmp_path), max_steps=4, report_to=[], disable_tqdm=True, use_cpu=True, save_strategy="no"
        ),
        train_dataset=Dataset.from_dict({"anchor": TEXTS, "positive": TEXTS[::-1]}),
        loss=losses.MultipleNegativesRankingLoss(model),
    )
    callback = gradual()
    callback.attach(trainer)
    trainer.train()
    assert callback.report.parameters.ratio < 1
    model.save(str(tmp_path / "small"))
    again = sentence_transformers.SentenceTransformer(str(tmp_path / "small"), device="cpu")
    assert torch.allclose(*(m.encode(TEXTS, convert_to_tensor=True) for m in (model, again)), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("when", ["begin", "end", "gradual"])
def test_the_supervised_trainer_of_trl(tmp_path, when):
    trl = pytest.importorskip("trl")
    settings = {"max_steps": 4, "report_to": [], "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}
    trainer = trl.SFTTrainer(
        tiny("llama", num_hidden_layers=1),
        args=trl.SFTConfig(str(tmp_path), **settings, bf16=False, max_length=16),
        train_dataset=Dataset.from_dict({"text": TEXTS}),
        processing_class=numbers_tokenizer(),
    )
    callback = SubpruneCallback(CONFIG, when=when, schedule=SCHEDULE)
    callback.attach(trainer)
    trainer.train()
    assert callback.report.parameters.after == trainer.model.num_parameters() < callback.report.parameters.before


def test_streamed_train_data(tmp_path):
    callback = gradual()
    trainer = make_trainer(tmp_path, callbacks=[callback], data=dataset().to_iterable_dataset())
    trainer.train()
    assert callback.report.data["fit_samples"] == 12


def test_batches_leave_the_random_state_and_the_loader_alone(tmp_path):
    trainer = make_trainer(tmp_path)
    loader = trainer.get_train_dataloader()
    collate = loader.collate_fn

    def drawing(examples):
        torch.rand(3)
        return collate(examples)

    loader.collate_fn = drawing
    state = torch.get_rng_state()
    batches = collated(trainer.model, loader, CONFIG)
    assert torch.equal(torch.get_rng_state(), state)
    assert [len(batch["input_ids"]) for batch in batches] == [6, 6, 6]


def test_each_text_of_a_sample_gives_a_batch():
    model = tiny("bert", num_hidden_layers=1)
    pairs = torch.arange(24).view(4, 6)
    names = ("anchor_input_ids", "anchor_attention_mask", "positive_input_ids", "label")
    loader = torch.utils.data.DataLoader(list(pairs), collate_fn=lambda rows: dict.fromkeys(names, torch.stack(rows)))
    batches = collated(model, loader, PruneConfig(samples=3, held_out=1, batch_size=4))
    assert [set(batch) for batch in batches] == [{"input_ids", "attention_mask"}, {"input_ids"}]


def test_batches_without_the_models_inputs_are_refused():
    model = tiny("bert", num_hidden_layers=1)
    loader = torch.utils.data.DataLoader([torch.ones(3)] * 4, collate_fn=lambda rows: {"pixels": torch.stack(rows)})
    with pytest.raises(ValueError, match="'pixels', of which none is the 'input_ids'"):
        collated(model, loader, CONFIG)


def test_samples_that_a_collator_joins_are_collated_one_by_one():
    model = tiny("llama")
    rows = dataset(rows=24).remove_columns(["attention_mask", "labels"])
    loader = DataLoader(rows, batch_size=4, collate_fn=DataCollatorWithFlattening())
    batches = collated(model, loader, CONFIG)
    assert [batch["input_ids"].shape for batch in batches] == [(1, 6)] * 18


@pytest.mark.parametrize("data", [None, "own"])
def test_streams_without_a_length_are_pruned_at_the_end(tmp_path, data):
    given = None if data is None else [{"input_ids": torch.randint(3, 120, (6, 6))} for _ in range(4)]
    trainer = make_trainer(tmp_path, data=dataset().to_iterable_dataset())
    callback = SubpruneCallback(CONFIG, data=given)
    callback.attach(trainer)
    trainer.train()
    assert callback.report is not None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": [{"input_ids": torch.randint(3, 120, (2, 6))}]}, "at least 3 samples"),
        ({"data": [{"input_ids": torch.randint(3, 120, (2, 600))}] * 9}, "does not fit Bert"),
        ({"config": PruneConfig(params=10, samples=12, held_out=6)}, "params"),
    ],
)
def test_what_would_fail_at_the_end_fails_before_the_training(tmp_path, changes, said):
    trainer = make_trainer(tmp_path)
    SubpruneCallback(**{"config": CONFIG, **changes}).attach(trainer)
    with pytest.raises(ValueError, match=said):
        trainer.train()
    assert trainer.state.global_step == 0
