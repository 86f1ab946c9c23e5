from dataclasses import replace

import pytest
import torch
from runs_of import QUICK, assert_unchanged, snapshot
from small_texts import TEXT_MODEL
from tiny import tiny
from transformers import BertModel, ViTConfig, ViTModel

from hf_subprune import PruneConfig, prune, recover
from hf_subprune.data.batches import Samples
from hf_subprune.data.trial import blamed_on_data, check_forward
from hf_subprune.evaluation.comparison import compare


def of(model, **batch):
    return Samples.of(model, [batch])


def ids(rows, length):
    return torch.full((rows, length), 3)


def test_what_runs_passes(bert):
    check_forward(of(bert, input_ids=ids(4, 8)))


def test_a_column_that_does_not_fit_is_named_with_the_shapes(bert):
    said = (
        r"\(batches\) does not fit BertModel: its forward fails on 2 samples, input_ids \(2, 8\) int64, "
        r"token_type_ids \(2, 5\) int64: RuntimeError: .*Without the column 'token_type_ids' it runs\. It takes token "
        "ids below 43, at most 64 a sample; the arguments input_ids, attention_mask, .*pass ready batches"
    )
    with pytest.raises(ValueError, match=said):
        check_forward(of(bert, input_ids=ids(4, 8), token_type_ids=torch.zeros(4, 5, dtype=torch.long)))


def test_a_sample_that_does_not_fit_is_named(bert):
    kinds = torch.tensor([[0] * 8, [7] * 8])  # there are two types of tokens
    with pytest.raises(ValueError, match="The second sample fails alone, the other one runs"):
        check_forward(of(bert, input_ids=ids(2, 8), token_type_ids=kinds))


def test_the_longest_samples_are_tried(bert):
    short, long = {"input_ids": ids(2, 8)}, {"input_ids": ids(2, 65)}
    with pytest.raises(ValueError, match=r"input_ids \(2, 65\).*at most 64"):
        check_forward(
            Samples(fit=[short, short], held_out=[long], fit_samples=4, held_out_samples=2, source="x", model=bert)
        )


def test_images_are_told_their_size():
    model = ViTModel(ViTConfig(image_size=16, patch_size=8, **TEXT_MODEL)).eval()
    with pytest.raises(ValueError, match=r"pixel_values \(2, 3, 20, 20\) float32.*images of 3 channels, 16 x 16"):
        check_forward(of(model, pixel_values=torch.zeros(2, 3, 20, 20)))


def test_what_fails_is_told_of_the_data_if_that_is_at_fault(bert):
    fault, fine = of(bert, input_ids=ids(2, 8) + 10**6), of(bert, input_ids=ids(2, 8))
    fault, fine = (replace(some, held_out=some.fit) for some in (fault, fine))
    with pytest.raises(ValueError, match="does not fit BertModel") as told, blamed_on_data(fault):
        bert(**fault.fit[0])
    assert isinstance(told.value.__cause__, IndexError)
    some = replace(fine, held_out=[{"input_ids": ids(2, 4) + 10**6}])
    with pytest.raises(ValueError, match=r"fails on 2 samples, input_ids \(2, 4\)"), blamed_on_data(some):
        bert(**some.held_out[0])
    with pytest.raises(ValueError, match="keep"), blamed_on_data(some):  # of the package itself: not all data is run
        PruneConfig(keep=2)
    with pytest.raises(KeyError, match="another matter"), blamed_on_data(fine):
        raise KeyError("another matter")


def test_running_out_of_memory_is_no_matter_of_the_data(bert):
    class Full(BertModel):
        def forward(self, input_ids=None):
            raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError):
        check_forward(of(Full(bert.config), input_ids=ids(2, 8)))


@pytest.mark.parametrize("entry", [
    lambda model, data: prune(model, data, PruneConfig(**QUICK)),
    lambda model, data: prune(model, data, PruneConfig(**QUICK, units=("experts",), keep={"experts": 0.5})),
    lambda model, data: recover(model, tiny("bert"), data, config=PruneConfig(**QUICK)),
    lambda model, data: compare(model, tiny("bert"), data, PruneConfig(**QUICK)),
])  # fmt: skip
def test_everything_that_runs_a_model_says_so_and_changes_nothing(entry):
    model = tiny("bert")
    before = snapshot(model)
    data = [{"input_ids": ids(4, 80)} for _ in range(8)]
    with pytest.raises(ValueError, match="does not fit Bert"):
        entry(model, data)
    assert_unchanged(model, before)
