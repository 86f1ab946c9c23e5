"""What tests that prune share: small settings, and what a run must leave alone."""

import copy
from pathlib import Path

import torch

FAMILIES = [
    "bert", "roberta", "distilbert", "modernbert", "gpt2", "opt", "gpt_neox", "llama", "mistral", "qwen2", "qwen3",
    "gemma2", "phi3", "vit", "clip", "t5", "bart", "whisper",
]  # fmt: skip
QUICK = {"samples": 12, "held_out": 4, "batch_size": 4}


def snapshot(model):
    """Everything that a failed run must leave alone: parameter objects and values, flags, configuration."""
    return (
        {name: (id(p), p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()},
        {name: module.training for name, module in model.named_modules()},
        copy.deepcopy(model.config.to_dict()),
    )


def assert_unchanged(model, before):
    parameters, training, config = before
    after = dict(model.named_parameters())
    assert set(after) == set(parameters)
    for name, (identity, value, requires_grad) in parameters.items():
        assert id(after[name]) == identity, name
        assert torch.equal(after[name], value), name
        assert after[name].requires_grad == requires_grad
    assert {name: module.training for name, module in model.named_modules()} == training
    assert model.config.to_dict() == config
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def files(folder):
    """The bytes of every file that does not depend on the clock."""
    kept = (
        path
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file() and "report" not in path.name and path.name != "README.md"
    )
    return {str(p.relative_to(folder)): p.read_bytes() for p in kept if p.suffix != ".png"}
