"""The recipe of gradual against one-shot pruning, on a little of its data."""

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def recipe():
    path = Path(__file__).parent.parent / "recipes" / "gradual_pruning.py"
    spec = importlib.util.spec_from_file_location("gradual_pruning", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_gaps_hide_the_word_and_label_it(recipe):
    tokenizer = recipe.make_tokenizer(["return the value of the key in a mapping", "is it a key or the value"] * 3)
    (first, *others) = recipe.gaps(["Return the value of a key"], tokenizer)
    assert [recipe.WORDS[gap["labels"]] for gap in (first, *others)] == ["the", "of", "a"]
    tokens = tokenizer.convert_ids_to_tokens(first["input_ids"])
    assert tokens[0] == "[CLS]" and tokens[1 + recipe.CONTEXT] == "[MASK]"
    assert tokens[recipe.CONTEXT] == "return" and tokens[2 + recipe.CONTEXT] == "value"
    assert len(tokens) == 2 * recipe.CONTEXT + 2
    assert first["attention_mask"] == [int(token != "[PAD]") for token in tokens]


@pytest.mark.slow
def test_all_ways_reach_the_same_size(recipe, capsys):
    arguments = ["--seeds", "1", "--steps", "4", "--original-steps", "4", "--samples", "16", "--paragraphs", "60"]
    (results,) = recipe.main(arguments)
    sizes = {results[way]["parameters"] for way in recipe.WAYS}
    assert len(sizes) == 1
    assert sizes.pop() < results["original"]["parameters"]
    assert all(0 <= row["accuracy"] <= 1 for row in results.values())
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[-3:]] == ["seed", "0", "mean"]
