"""Which classes belong to a configuration."""

import pytest
from transformers import BertConfig, BertForMaskedLM, BertModel, LlavaConfig, LlavaForConditionalGeneration

from hf_subprune.coverage.architectures import model_class, own_classes
from hf_subprune.coverage.tiny import tiny_config


def test_heads():
    assert model_class(BertConfig, "base") is BertModel
    assert model_class(BertConfig, "main") is BertForMaskedLM
    assert model_class(LlavaConfig, "main") is LlavaForConditionalGeneration
    with pytest.raises(ValueError, match="head"):
        model_class(BertConfig, "tail")


def test_configurations_outside_the_auto_classes_have_a_class():
    config_class = type(tiny_config("sam").vision_config)
    assert own_classes(config_class)[0].config_class is config_class
