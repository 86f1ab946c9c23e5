"""Forwards that compute with sizes of the unpruned model, adapted to a module with fewer units.

Three things that no attribute of a module says: the width of its heads together where its forward takes it to be that
of what it is given (`batch, length, width = hidden_states.size()`), arguments with entries for every unit that are
made elsewhere (ALiBi biases, masks by head), and that no unit is left. The first is read from an attribute after
adaptation, the second are cut to the entries of the units that are left, and without units the forward is not run.
What `nn.MultiheadAttention` computes is written anew.

Only torch and Python's own library are imported: `remote_code` copies this file as it is beside the weights.
"""

import __future__

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Callable, Collection, Mapping
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from torch.nn import functional

INNER_WIDTH = "inner_width"
"""Attribute of an adapted module: the width of its units together, which its forward takes for that of its input."""
CUT_ARGUMENTS = "cut_arguments"
"""Attribute of an adapted module: argument -> `(dim, entries)`, before it is cut; its buffers say what is kept."""

BYPASSED = "bypassed"
"""Attribute of a module that has no unit left: `(consumer, entries)`, as in `blocks.Bypass`."""

_ELSEWHERE = ("key_value_states", "encoder_hidden_states")
"""Arguments with what attention looks at, if that is not what it is applied to."""


def kept_entries(argument: str) -> str:
    """Name of the buffer of an adapted module with the entries of `argument` to keep: `(k,)` int64, increasing."""
    return f"kept_{argument}"


def adapted(
    module: Any,
    inner_width: int | None,
    cut: Mapping[str, tuple[int, int]],
    bypassed: tuple[str, int] | None = None,
) -> dict[str, Any]:
    """What to set in `vars(module)` so that its forward follows an inner width and cuts arguments, or is not run.

    Args:
        module: The module; it is not changed.
        inner_width: Features of its units together; `None` where its forward does not derive it from its input.
        cut: Argument -> the dimension along which it is cut, and its entries for all units. A dimension that is a
            multiple of those (the batch times the heads) is taken as that many times all units.
        bypassed: `(consumer, entries)`, as in `blocks.Bypass`, where the module has no unit left; else `None`.

    Raises:
        ValueError: the forward does not take apart the shape of what it is given.
    """
    entries: dict[str, Any] = {} if inner_width is None else {INNER_WIDTH: inner_width}
    if cut:
        entries[CUT_ARGUMENTS] = dict(cut)
    if bypassed is not None:
        entries[BYPASSED] = tuple(bypassed)
    # Where accelerate runs a module through hooks of its own, the module's forward has this name.
    name = "_old_forward" if "_old_forward" in vars(module) else "forward"
    forward = AdaptedForward(module, inner_width is not None, bool(cut), bypassed is not None)
    return {**entries, name: forward}


class AdaptedForward:
    """The forward of one module, made from that of its class; copies and pickles of the module make their own.

    Args:
        module: The module; it is not changed, and may be without anything but its class as yet.
        follows: Whether it reads its inner width.
        cuts: Whether it cuts its arguments.
        bypassed: Whether it is not run at all.

    Raises:
        ValueError: as `adapted`.
    """

    def __init__(self, module: Any, follows: bool, cuts: bool, bypassed: bool = False) -> None:
        forward = type(module).forward
        if forward is nn.MultiheadAttention.forward:
            forward = multihead_attention
        if follows and forward is not multihead_attention:
            forward = reading_inner_width(forward)
            if forward is None:
                raise ValueError(
                    f"the forward of {type(module).__name__} was adapted to an inner width, but here it takes no "
                    "shape apart: load with the version of transformers that config.json names"
                )
        forward = _cutting(forward) if cuts else forward
        self.function = _bypassing(forward) if bypassed else forward
        self.module, self.follows, self.cuts, self.bypassed = module, follows, cuts, bypassed
        self.__signature__ = inspect.signature(MethodType(self.function, module))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.module, *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.module, self.follows, self.cuts, self.bypassed)


@functools.cache
def reading_inner_width(forward: Callable) -> Callable | None:
    """`forward` with the last size of the first shape that it takes apart read from `self.inner_width` instead.

    Returns:
        The function, compiled from the source of `forward` under its own lines, inside of the decorators that it had;
        `None` if it takes none apart.
    """
    plain = inspect.unwrap(forward)
    if not isinstance(plain, FunctionType) or plain.__code__.co_freevars:
        return None  # what a class around it adds would be lost
    try:
        lines, first = inspect.getsourcelines(plain)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, SyntaxError):  # no source, or no function of its own, such as a lambda
        return None
    function = tree.body[0]
    if not isinstance(function, ast.FunctionDef):
        return None
    given = set(inspect.signature(plain).parameters)
    first_taken = next((node for node in _in_order(function) if _unpacked(node) or _taken(node, given)), None)
    if first_taken is None:
        return None
    if _unpacked(first_taken):
        _rebind(tree, first_taken)
    else:
        _ReadInnerWidth(_taken(first_taken, given)).visit(tree)
    function.decorator_list = []  # those around `plain` are put around what is compiled
    ast.increment_lineno(ast.fix_missing_locations(tree), first - 1)
    future = plain.__code__.co_flags & __future__.annotations.compiler_flag
    code = compile(tree, plain.__code__.co_filename, "exec", flags=future, dont_inherit=True)
    defined: dict[str, Any] = {}
    exec(code, plain.__globals__, defined)
    return _decorated_as(forward, plain, defined[plain.__name__])


def _decorated_as(forward: Callable, plain: FunctionType, rewritten: FunctionType) -> Callable | None:
    """`rewritten` inside of copies of the functions that decorators put around `plain` to make `forward`.

    Returns:
        The outermost copy; `None` where one of them does not hold what it wraps as a variable of its own.
    """
    if forward is plain:
        rewritten.__dict__.update(plain.__dict__)
        return rewritten
    within = vars(forward)["__wrapped__"]
    inner = _decorated_as(within, plain, rewritten)
    cells = getattr(forward, "__closure__", None) or ()
    if inner is None or not isinstance(forward, FunctionType) or all(_content(cell) is not within for cell in cells):
        return None
    closure = tuple(CellType(inner) if _content(cell) is within else cell for cell in cells)
    copied = FunctionType(forward.__code__, forward.__globals__, forward.__name__, forward.__defaults__, closure)
    copied.__kwdefaults__ = forward.__kwdefaults__
    functools.update_wrapper(copied, forward)
    vars(copied)["__wrapped__"] = inner
    return copied


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # nothing was put into it
        return None


def _in_order(function: ast.stmt) -> list[ast.stmt]:
    within = [node for node in ast.walk(function) if isinstance(node, ast.stmt) and node is not function]
    return sorted(within, key=lambda node: node.lineno)


def _unpacked(node: ast.stmt) -> tuple[str, str] | None:
    """`("c", "x")` for a statement `a, b, c = x.size()` or `a, b, c = x.shape`, else `None`."""
    found = re.fullmatch(r"\(?.*, (\w+)\)? = (\w+)\.(?:size\(\)|shape)", ast.unparse(node))
    return None if found is None else (found[1], found[2])


def _taken(node: ast.stmt, given: Collection[str]) -> str:
    """The first expression in a statement such as `x.shape[-1]`, of an argument `x` that is `given`; else `""`."""
    found = re.findall(r"\b((\w+)\.(?:shape\[(?:-1|2)\]|size\((?:-1|2)\)))", ast.unparse(node))
    return next((expression for expression, name in found if name in given), "")


def _rebind(tree: ast.AST, unpacking: ast.stmt) -> None:
    """Insert `c = self.inner_width` behind the statements that mean the width of the tensor itself."""
    name, tensor = _unpacked(unpacking) or ("", "")
    lists = [value for node in ast.walk(tree) for value in vars(node).values() if isinstance(value, list)]
    body = next(body for body in lists if unpacking in body)
    last = max(i for i, node in enumerate(body) if node is unpacking or _speaks_of(node, tensor, name))
    set_width = ast.parse(f"{name} = self.{INNER_WIDTH}").body[0]
    body.insert(last + 1, ast.copy_location(set_width, body[last]))


def _speaks_of(node: ast.AST, tensor: str, size: str) -> bool:
    """Whether a statement reads `size` and a method or attribute of `tensor`."""
    within = list(ast.walk(node))
    subject = any(isinstance(one, ast.Attribute) and ast.unparse(one.value) == tensor for one in within)
    return subject and any(isinstance(one, ast.Name) and one.id == size for one in within)


class _ReadInnerWidth(ast.NodeTransformer):
    """Puts `self.inner_width` in the place of an expression."""

    def __init__(self, expression: str) -> None:
        self.expression = expression

    def visit(self, node: ast.AST) -> Any:
        if isinstance(node, (ast.Subscript, ast.Call)) and ast.unparse(node) == self.expression:
            return ast.copy_location(ast.parse(f"self.{INNER_WIDTH}", mode="eval").body, node)
        return self.generic_visit(node)


@functools.cache
def _cutting(forward: Callable) -> Callable:
    """`forward` of a module that first cuts its arguments as `cut_arguments` says."""
    names = [name for name in inspect.signature(forward).parameters if name != "self"]

    @functools.wraps(forward)
    def cutting(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        for name, (dim, entries) in self.cut_arguments.items():
            value = given.get(name)
            if value is not None:
                kept = getattr(self, kept_entries(name)).to(value.device)
                repeated = value.unflatten(dim, (-1, entries))
                given[name] = repeated.index_select(dim + 1, kept).flatten(dim, dim + 1)
        return forward(self, *(given.pop(name) for name in names[: len(args)]), **given)

    return cutting


@functools.cache
def _bypassing(forward: Callable) -> Callable:
    """In the place of `forward` of a module without units: what `bypassed` says, of no features."""
    names = [name for name in inspect.signature(forward).parameters if name != "self"]

    @functools.wraps(forward)
    def bypassing(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        inputs = given[names[0]]
        _count_tokens(self, inputs, given)
        consumer, entries = self.bypassed
        output = inputs[..., :0]
        if consumer == ".":
            output = self.bias.expand(*output.shape[:-1], -1)
        elif consumer:
            output = self.get_submodule(consumer)(output)
        return (output, *[None] * (entries - 1)) if entries else output

    return bypassing


def _count_tokens(module: Any, inputs: torch.Tensor, given: Mapping[str, Any]) -> None:
    """Let the cache of keys and values, if there is one, have one number a token for a module that has none of these.

    What is to come reads from the first layers of a cache how many tokens went before it.
    """
    caches = [value for value in given.values() if hasattr(value, "get_seq_length")]
    layer = getattr(module, "layer_idx", getattr(module, "layer_id", None))
    if caches and layer is not None and all(given.get(name) is None for name in _ELSEWHERE):
        token = inputs.new_zeros((inputs.shape[0], 1, inputs.shape[1], 1))
        getattr(caches[0], "self_attention_cache", caches[0]).update(token, token, layer)


def multihead_attention(
    self: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_padding_mask: torch.Tensor | None = None,
    need_weights: bool = True,
    attn_mask: torch.Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What `nn.MultiheadAttention` computes, for heads that together may be narrower than its inputs.

    Torch's own takes their width to be that of the inputs, and multiplies by the weights without calling the linears
    that hold them. `is_causal` is a hint at what `attn_mask` is, which nothing here needs.
    """
    inputs = [query, key, value]
    if query.ndim == 2:
        inputs = [one.unsqueeze(0) for one in inputs]
    elif not self.batch_first:
        inputs = [one.transpose(0, 1) for one in inputs]
    q, k, v = (one.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for one in _projected(self, inputs))
    mask = None
    if attn_mask is not None:
        mask = _additive(attn_mask.unflatten(0, (-1, self.num_heads)) if attn_mask.ndim == 3 else attn_mask, q)
    if key_padding_mask is not None:
        padding = _additive(key_padding_mask.view(len(k), 1, 1, -1), q)
        mask = padding if mask is None else mask + padding
    dropout = self.dropout if self.training else 0.0
    weights = None
    if need_weights:
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        weights = functional.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
        heads = weights @ v
        weights = weights.mean(1) if average_attn_weights else weights
    else:
        heads = functional.scaled_dot_product_attention(q, k, v, mask, dropout)
    output = self.out_proj(heads.transpose(1, 2).flatten(-2))
    if query.ndim == 2:
        return output.squeeze(0), None if weights is None else weights.squeeze(0)
    return output if self.batch_first else output.transpose(0, 1), weights


def _projected(attention: Any, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Queries, keys and values, by one stacked weight or by three linears while they are apart."""
    if attention.in_proj_weight is None:
        linears = (attention.q_proj, attention.k_proj, attention.v_proj)
        return [linear(one) for linear, one in zip(linears, inputs, strict=True)]
    biases = (None,) * 3 if attention.in_proj_bias is None else attention.in_proj_bias.chunk(3)
    return list(map(functional.linear, inputs, attention.in_proj_weight.chunk(3), biases))


def _additive(mask: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A mask as what is added to scores: `-inf` where a boolean one says that nothing is looked at."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))
    return mask.to(like.dtype)
