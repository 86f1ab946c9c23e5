"""How much an error at each consumer's output changes the model's output, without labels."""

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ..blocks import Block
from ..data.batches import Samples, cut_to_logits, entries
from ..data.padding import token_mask
from ..data.probe import is_divisible, samples_in
from ..evaluation.outputs import compared_output
from ..models.experts import by_layer
from ..models.linears import feature_axis, input_rows, matrix_shape, weight_matrix
from ..models.offload import device_of
from ..models.precision import fast_products
from ..models.running import (
    Batch,
    as_mapping,
    copied,
    encoder_of,
    forward_replaced,
    goes_on_with_text,
    hooked,
    input_device,
    modules_by_path,
    placed,
    said_again,
    uncached,
    undisturbed,
)
from ..runs.processes import own_share, summed
from ..runs.stages import SENSITIVITIES, steps
from ..runs.store import Store

# Samples are looked at in this many rounds, of which as many are made as it takes for this many rows an output.
_ROUNDS = 4
_ROWS_AN_OUTPUT = 2
# Of long texts, a round looks at one of so many parts of each, if that has at least so many tokens, in place of some
# whole texts: what is rare is said in few of them.
_PARTS = 7
_TOKENS_OF_A_PART = 64
# Numbers of an output whose gradient is made at once.
_NUMBERS_AT_ONCE = 1 << 20


def output_metrics(
    samples: Samples,
    blocks: Sequence[Block],
    *,
    probes: int = 1,
    seed: int = 0,
    recomputed: Sequence[str] = (),
    store: Store | None = None,
) -> "Means":
    """`M = E[g g']` at each consumer's output, `g` the gradient there of a label-free function of the model's output.

    For logits `M` is the true Fisher, the expectation over `y` of the model's own distribution of the squared gradient
    of `log p(y | x)`, and `e' M e / 2` the divergence that an error `e` of the consumer's output causes, to second
    order. The function is the sum over y of `+-sqrt(p(y | x)) log p(y | x)`, with random signs and the roots held
    fixed: it has the same expectation as one `y` drawn, without the rare draws that matter most where the model is
    sure. For hidden states it is the inner product of the output with a standard normal direction: `M` is the
    Gauss-Newton matrix, and `e' M e` the squared error of the output. So it is for logits of one row a sample, up to
    their mean: a classifier that is sure of its samples has next to no curvature, until errors grow past its margins.
    Either is summed over the output's tokens and
    averaged over those of the consumer; padding counts on neither side.

    One forward and one backward a batch and probe, on every fourth sample where this gives twice as many rows as a
    consumer has outputs; for consumers that have fewer, on more or all of them. Of long texts that a causal language
    model reads, it is a seventh of each, as if it were a text of its own. Where consumers that lack rows are all in a
    decoder, it gets further draws on the same samples, whose encoder runs once. No parameter gets a gradient, and the
    activations of one batch are held at a time. Weights, flags, gradients and the random state of the model stay as
    they are.

    Args:
        samples: Whose batches to fit on are run, in their model.
        blocks: At whose consumers.
        probes: Draws of signs, or of directions, a batch.
        seed: Of the draws.
        recomputed: Paths of modules that are run once more in the backward, so that it holds no more of them than what
            they read: neither activations nor weights that are read when they are needed.
        store: Of the sums; in memory without one.

    Returns:
        By block name, `(m, m)` on the consumer's device in float32, as the gradients are; zeros where the output does
        not depend on it. The experts of one layer have one matrix, of the tokens of all of them: some get very few.
    """
    groups = by_layer(modules_by_path(samples.model), blocks)
    store = store or Store()
    sums = [_OuterSum(samples, group, store, str(index)) for index, group in enumerate(groups)]
    _run_backwards(samples, sums, probes=probes, seed=seed, recomputed=recomputed)
    for total in sums:
        total.add_up()
    return Means({block.name: total.kept for total in sums for block in total.blocks}, store)


def activation_gradients(
    samples: Samples,
    blocks: Sequence[Block],
    *,
    seed: int = 0,
    recomputed: Sequence[str] = (),
) -> dict[str, torch.Tensor]:
    """Mean `|activation x gradient|` of each of a consumer's inputs, of the function of `output_metrics`.

    The paper's LayerActGrad (Molchanov et al., 2017) takes the gradient of a loss, which needs labels; this does not.

    Args:
        samples: As for `output_metrics`, and so are the others.

    Returns:
        By block name, `(n,)` float64, by column of the consumer.
    """
    sums = [_ActivationGradientSum(samples, [block]) for block in blocks]
    _run_backwards(samples, sums, probes=1, seed=seed, recomputed=recomputed)
    for total in sums:
        total.add_up()
    return {total.blocks[0].name: total.total / max(total.rows, 1) for total in sums}


def entries_at_once(samples: Samples) -> int:
    """Entries of the largest piece of a batch that one backward is of, padding among them."""
    model, batches = samples.model, samples.fit
    parts = (batch for part in range(_rounds(model, batches)) for _, batch in _parts(model, batches, part))
    return max((entries(piece) for batch in parts for piece in cut_to_logits(model, batch)), default=0)


def _run_backwards(
    samples: Samples,
    sums: Sequence["_GradientSum"],
    *,
    probes: int,
    seed: int,
    recomputed: Sequence[str],
) -> None:
    """Show the sums the gradients of some or all samples, see `output_metrics`."""
    model, batches = samples.model, samples.fit
    inputs = [(block.consumer, total.hold) for total in sums for block in total.blocks]
    outputs = [(block.consumer, partial(total.watch, block.consumer)) for total in sums for block in total.blocks]
    with (
        undisturbed(model),
        uncached(model),  # a layer that runs once more would find its own keys there
        fast_products(model.parameters()),
        torch.enable_grad(),
        hooked(model, inputs=inputs, outputs=outputs),
        ExitStack() as stack,
    ):
        model.requires_grad_(False)
        for path in recomputed:
            module = model.get_submodule(path)
            # A backward is a call of its own, in which modes of the calls around it are off.
            again = partial(
                checkpoint,
                module.forward,
                use_reentrant=False,
                context_fn=lambda: (nullcontext(), fast_products(model.parameters())),
            )
            stack.enter_context(forward_replaced(module, again))
        encoder = _EncoderAgain(model)
        parts: list[tuple[int, Batch]] = []
        for part in range(_rounds(model, batches)):
            known = part > 0 and encoder.knows_all_that(total for total in sums if not total.enough)
            if not known:
                parts = list(_parts(model, batches, part))
            for number, batch in steps(SENSITIVITIES, parts):
                generator = _generator(seed, part, number)
                for place, piece in enumerate(cut_to_logits(model, batch)):
                    for total in sums:
                        total.batch = piece
                    arguments = placed(model, piece)
                    for _ in range(probes):
                        with encoder.said((number, place), known=known):
                            found = _probe(samples, piece, model(**arguments), generator)
                        if found is not None and found[0].requires_grad:
                            found[0].backward(found[1])
                        del found  # logits and their gradient, which the next forward needs the room of
            rows = summed(torch.tensor([total.rows for total in sums], device=input_device(model))).tolist()
            for seen, total in zip(rows, sums, strict=True):
                total.enough = seen >= _ROWS_AN_OUTPUT * total.m
            if all(total.enough for total in sums):
                break


class _EncoderAgain:
    """What the encoder of a model with a decoder puts out, for further draws where its own blocks need no more rows.

    A decoder that writes down sound, or a short answer, has few rows a sample, and what lies before it is nearly all
    of a forward: other draws of signs for the same samples give it rows without that.

    Args:
        model: With or without a decoder.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self._path = model, encoder_of(model)
        self._said: dict[tuple[int, int], Any] = {}

    def knows_all_that(self, lacking: Iterable["_GradientSum"]) -> bool:
        """Whether sums that lack rows are all of blocks outside of an encoder."""
        path = self._path
        return path is not None and not any(b.consumer.startswith(f"{path}.") for s in lacking for b in s.blocks)

    def said(self, piece: tuple[int, int], *, known: bool) -> AbstractContextManager[None]:
        """Within it the encoder puts out what it has put out for a piece of a batch, or that is kept."""
        if self._path is None:
            return nullcontext()
        if not known:
            return hooked(self._model, outputs=[(self._path, partial(self._keep, piece))])
        return said_again(self._model.get_submodule(self._path), lambda: self._said[piece])

    def _keep(self, piece: tuple[int, int], output: Any) -> None:
        with torch.no_grad():  # its graph is let go of
            self._said[piece] = copied(output)


def _generator(seed: int, part: int, number: int) -> torch.Generator:
    """Of the draws for a part of a batch: the same in every process, others for each. Of a seed only 32 bits count."""
    return torch.Generator().manual_seed(random.Random(f"{seed}-{part}-{number}").getrandbits(32))


def _rounds(model: PreTrainedModel, batches: Sequence[Batch]) -> int:
    """Rounds in which all is looked at."""
    return _PARTS if any(_tokens_of_a_part(model, batch) for batch in batches) else _ROUNDS


def _parts(model: PreTrainedModel, batches: Sequence[Batch], part: int) -> Iterator[tuple[int, Batch]]:
    """A seventh of each long text, or else every fourth sample, from `part` on; a batch that cannot be cut is one.

    With the number of the batch, and only those that fall to this process.
    """
    own, before = set(own_share(len(batches))), 0
    for number, batch in enumerate(batches):
        count = samples_in(batch) if is_divisible(batch) else 1
        first = (part - before) % _ROUNDS
        before += count
        if number not in own:
            continue
        # Forwards take `view`s of what they are given.
        if length := _tokens_of_a_part(model, batch):
            tokens = slice(start := (part + number) % _PARTS * length, start + length)
            yield number, {name: value[:, tokens].contiguous() for name, value in batch.items()}
        elif part < _ROUNDS and first < count:
            cut = {name: value[first::_ROUNDS].contiguous() for name, value in batch.items()} if count > 1 else batch
            yield number, cut


def _tokens_of_a_part(model: PreTrainedModel, batch: Batch) -> int:
    """Tokens of a seventh of each text; 0 where texts are short or padded, or parts of them would be no texts."""
    if not (goes_on_with_text(model) and is_divisible(batch) and "input_ids" in batch):
        return 0
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    if any(value.shape != ids.shape for value in batch.values()):
        return 0  # images among the text, what each token may attend to
    length = ids.shape[1] // _PARTS
    return length if length >= _TOKENS_OF_A_PART and (mask is None or bool(mask.all())) else 0


class Means(Mapping[str, torch.Tensor]):
    """The matrices by block name; those in files are read when they are asked for.

    Args:
        parts: By name what stands for the sum in the store, the number of rows that it is of, and its device.
        store: Of the sums.
    """

    def __init__(self, parts: Mapping[str, tuple[Any, int, torch.device]] | None = None, store: Store | None = None):
        self.parts, self.store = dict(parts or {}), store or Store()

    def __getitem__(self, name: str) -> torch.Tensor:
        kept, rows, device = self.parts[name]
        return (self.store.read(kept) / max(rows, 1)).to(device)

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)

    def without(self, names: Sequence[str]) -> "Means":
        """All but some of the blocks."""
        return Means({name: part for name, part in self.parts.items() if name not in names}, self.store)


class _GradientSum:
    """Sums something of the gradients over rows of a consumer's output, or of those of the experts of one layer."""

    def __init__(self, samples: Samples, blocks: Sequence[Block]):
        consumer: Any = samples.model.get_submodule(blocks[0].consumer)
        self.samples, self.blocks, self.rows, self.consumer = samples, blocks, 0, consumer
        self.enough = False  # whether further rows are of no use
        self.n, self.m = matrix_shape(consumer)
        self._axis = feature_axis(consumer)
        self.batch: Batch = {}
        self.held: torch.Tensor | None = None
        self.device = device_of(consumer.weight)

    def hold(self, inputs: torch.Tensor) -> None:
        """Keep what of a consumer's input the backward needs, until its output comes."""

    def watch(self, consumer: str, output: torch.Tensor) -> torch.Tensor:
        """The graph starts at the first consumer that lacks rows, gradients are read at every one that does."""
        if self.enough or not torch.is_grad_enabled():
            return output  # without gradients the model itself runs this call, of several
        if not output.requires_grad:
            output = output.detach().requires_grad_().clone()  # a leaf could not be written into by what follows
        shape = output.movedim(self._axis, -1).shape
        mask = token_mask(self.samples.model, consumer, self.batch, shape)

        def add(gradient: torch.Tensor) -> None:
            g = gradient.movedim(self._axis, -1).reshape(-1, shape[-1])
            real = slice(None) if mask is None else mask.to(g.device)
            self._add(g[real].float(), inputs, real)
            self.rows += len(g[real])

        inputs = self.held
        output.register_hook(add)
        return output

    def _add(self, g: torch.Tensor, inputs: Any, real: Any) -> None:
        """Gradients `(rows, m)` at the real tokens."""
        raise NotImplementedError

    def add_up(self) -> None:
        """Add the sums of all processes."""
        self.rows = int(summed(torch.tensor(self.rows, device=self.device)))


class _OuterSum(_GradientSum):
    """Sums `g g'`."""

    def __init__(self, samples: Samples, blocks: Sequence[Block], store: Store, name: str):
        super().__init__(samples, blocks)
        self._store, self._name = store, name
        self._outer = store.sum(name, self.m, self.device)

    def _add(self, g: torch.Tensor, inputs: Any, real: Any) -> None:
        self._outer.add(g.T @ g)

    def add_up(self) -> None:
        """Add the sums of all processes, and keep what they come to."""
        self._outer.add_up()
        super().add_up()
        self.kept = self._store.keep(self._name, self._outer.total().float()), self.rows, self.device
        self._outer.drop()


class _ActivationGradientSum(_GradientSum):
    """Sums `|x * (W g)|`, `x` a consumer's input and `g` the gradient at its output."""

    def __init__(self, samples: Samples, blocks: Sequence[Block]):
        super().__init__(samples, blocks)
        self.total = torch.zeros(self.n, dtype=torch.float64, device=self.device)

    def hold(self, inputs: torch.Tensor) -> None:
        self.held = inputs.detach()

    def _add(self, g: torch.Tensor, inputs: torch.Tensor, real: Any) -> None:
        x = torch.cat(list(input_rows(self.consumer, inputs)))[real].float()
        W = weight_matrix(self.consumer).to(g)
        self.total += (x * (g @ W.T)).abs().sum(0, dtype=torch.float64).to(self.device)

    def add_up(self) -> None:
        self.total = summed(self.total)
        super().add_up()


def _probe(
    samples: Samples, batch: Batch, output: Any, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The rows of the output that count, and the gradient there of the scalar whose gradient is taken.

    `None` where the output is not finite (moments will name the culprit).
    """
    kind, compared = compared_output(as_mapping(output))
    mask = token_mask(samples.model, "", batch, compared.shape)
    rows = compared.reshape(-1, compared.shape[-1])
    rows = (rows if mask is None else rows[mask.to(rows.device)]).float()
    if len(rows) and not torch.isfinite(torch.stack(rows.detach().aminmax())).all():
        return None
    if kind == "logits" and compared.ndim == 2:
        rows, kind = rows - rows.mean(1, keepdim=True), "hidden"
    if kind == "hidden":
        return rows, torch.randn(rows.shape, generator=generator).to(rows)
    gradient = torch.empty_like(rows)
    at_once = max(1, _NUMBERS_AT_ONCE // rows.shape[1])
    for some, into in zip(rows.detach().split(at_once), gradient.split(at_once), strict=True):
        p = some.softmax(1)
        signs = torch.randint(2, p.shape, generator=generator, dtype=torch.int8).to(p.device)
        torch.mul(p.sqrt(), signs.mul_(2).sub_(1), out=into)
        into.addcmul_(p, into.sum(1, keepdim=True), value=-1)
    return rows, gradient
