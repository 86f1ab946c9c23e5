"""Whether grouped-query attention loses whole key/value heads, or as many query heads of each of them."""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

from ..blocks import Block, place_of
from ..config import PruneConfig
from ..runs.processes import from_all, is_mine
from ..runs.workspace import Workspace
from ..solver.curves import expected_loss
from ..solver.problem import Problem, columns_of
from ..solver.settings import Settings
from ..solver.solve import choose
from .families import Families, loads_as_stock
from .survey import Survey
from .targets import Target
from .widths import choose_units

# Units of one kind alone are removed where that is predicted to lose at most so many times what is least: predictions
# are sums of what a few blocks lose one by one, and of several kinds at once they promise too much. On SmolLM2-135M at
# 78%, neurons alone lose .8 times what is predicted, neurons and query heads 1.2 times.
_ONE_KIND = 1.25


def better_units(
    survey: Survey, widths: Mapping[str, int], config: PruneConfig, work: Workspace
) -> tuple[list[Block], dict[str, int]]:
    """For each block that could lose query heads instead of key/value heads, the units that lose less.

    Both are tried on the original model. By budget `"uniform"` they are compared at what the block was given: its
    key/value heads, and as many query heads as cost no more. Other budgets share out again, over the losses of both.
    Where all layers are to be stored with one width, they decide together.

    Args:
        survey: Of the model and its moments.
        widths: Units that each block keeps where whole key/value heads go, by name.
        config: One of those that it was taken for.
        work: Where the comparison is kept.

    Returns:
        The blocks to prune, in forward order, some with query heads as units, and how many units each block keeps, by
        name.
    """
    blocks = [b for b in survey.blocks if widths[b.name] < b.units]
    if config.allocation() == "uniform":
        return _at_equal_cost(survey, blocks, widths, config, work)
    target = survey.target(config)
    if target.name == "latency":  # what these widths take was timed, and the sum of their costs is not that
        (part,) = target.parts
        target = replace(target, parts=(replace(part, limit=target.cost(dict(widths)) - target.rest),))
    return units_by_loss(survey, target, config, _offered(survey, survey.families_of(config)))


def units_by_loss(
    survey: Survey, target: Target, config: PruneConfig, offered: Sequence[Block] = ()
) -> tuple[list[Block], dict[str, int]]:
    """As `better_units`, for budgets that share out by what blocks lose.

    Args:
        survey: Of the model and what its blocks lose.
        target: What they may cost.
        config: One of those that the survey was taken for.
        offered: Blocks that may lose query heads.
    """
    families = survey.families_of(config)
    try:
        found = _of_least_loss(survey, target, config, families, offered)
    except ValueError:  # what the config can say is out of reach
        if config.layout == "stock" or not families.even:
            raise
        gone = [block for block in survey.blocks if block.name in families.gone]
        families = Families.single(survey.blocks).without(gone)
        found = _of_least_loss(survey, target, config, families, offered)
    kinds = {block.kind for block in found[0] if block.name not in families.gone}
    if not families.even or len(kinds) < 2:
        return found
    most = _ONE_KIND * survey.predicted_loss(*found)
    for kind in sorted(kinds):
        others = {block.name for block in survey.blocks if block.kind != kind} - families.gone
        alone = replace(families, whole=families.whole | others)
        with suppress(ValueError):  # this kind has too few to lose
            one = _of_least_loss(survey, target, config, alone, offered)
            if survey.predicted_loss(*one) <= most:
                found, most = one, survey.predicted_loss(*one)
    return found


def _of_least_loss(
    survey: Survey, target: Target, config: PruneConfig, families: Families, offered: Sequence[Block]
) -> tuple[list[Block], dict[str, int]]:
    of_queries = {b.name: survey.query_losses[b.name] for b in offered if b.name in survey.query_losses}
    while True:
        chosen = choose_units(survey.blocks, target, config, families, survey.predicted(), of_queries)
        to_prune = [block for block, kept in chosen.values() if kept < block.units]
        kept_units = {name: kept for name, (_, kept) in chosen.items()}
        left = [block for block in to_prune if block.name not in families.gone]
        heads = [(b.name, b.sets, kept_units[b.name]) for b in left if b.kind == "attention"]
        if not (families.even and heads) or _loads(survey, *_with_gone(survey, left, kept_units, families)):
            return to_prune, kept_units
        families = replace(families, refused=families.refused | set(heads))


def _with_gone(
    survey: Survey, left: Sequence[Block], kept: Mapping[str, int], families: Families
) -> tuple[list[Block], dict[str, int]]:
    """Blocks and their widths, and those that are gone at the width of one at the same place: the config says both."""
    like = {place_of(block)[:2]: block for block in left}
    blocks, widths = list(left), dict(kept)
    for block in (block for block in survey.blocks if block.name in families.gone):
        if one := like.get(place_of(block)[:2]):
            blocks.append(block if block.queries is None or one.sets == block.sets else block.queries)
            widths[block.name] = kept[one.name]
    return blocks, widths


def alternatives(
    survey: Survey, config: PruneConfig, blocks: Sequence[Block], kept: Mapping[str, int]
) -> tuple[tuple[str, float], ...]:
    """`Allocation.alternatives` of one size: the best that there is for each number of heads to keep.

    Args:
        survey: Of the model and what its blocks lose.
        config: One of those that it was taken for.
        blocks: That were chosen to lose units.
        kept: By name, how many each block keeps.
    """
    families = survey.families_of(config)
    if not families.even or not survey.losses:
        return ()
    target, predicted = survey.target(config), survey.predicted()
    of_queries = {block.name: survey.query_losses[block.name] for block in _offered(survey, families)}
    found: dict[str, float] = {}
    for family in families.of(survey.candidates):
        first = family[0]
        if first.kind != "attention" or first.name in families.gone:
            continue
        options = {(first.sets, width) for width in range(1, first.units + 1)}
        if first.queries is not None:
            options |= {(first.queries.sets, width) for width, _ in of_queries.get(first.name, ())}
        for only in options:
            others = {(block.name, *option) for block in family for option in options - {only}}
            one = replace(families, refused=families.refused | others)
            try:
                chosen = choose_units(survey.blocks, target, config, one, predicted, of_queries)
            except ValueError:  # so many heads are too many, or the config cannot say it
                continue
            widths = {name: width for name, (_, width) in chosen.items()}
            found[_in_words(survey, chosen)] = survey.predicted_loss(
                [block for block, width in chosen.values() if width < block.units], widths
            )
    losing = {block.name: block for block in blocks}
    own = _in_words(survey, {b.name: (losing.get(b.name, b), kept[b.name]) for b in survey.candidates})
    return tuple(sorted(found.items(), key=lambda one: (one[0] != own, one[1])))


def _in_words(survey: Survey, chosen: Mapping[str, tuple[Block, int]]) -> str:
    """The widths of candidates, each once: `"mlp 1088 of 1536, attention 3 of 3"`."""
    blocks = (chosen[block.name] for block in survey.candidates)
    return ", ".join(
        dict.fromkeys(
            f"{block.kind}{' queries' if block.sets > 1 else ''} {width} of {block.units}" for block, width in blocks
        )
    )


def _offered(survey: Survey, families: Families) -> list[Block]:
    """Blocks that may lose query heads; of those with one width in all layers, only where all alike may."""
    offered = {b.name: b.queries for b in survey.candidates if b.queries is not None and b.tie is None}

    def shape(block: Block) -> tuple[int, ...]:
        queries = offered.get(block.name)
        return () if queries is None else (queries.units, queries.parameters_per_unit, block.parameters_per_unit)

    alike = [family for family in families.of(survey.blocks) if len({shape(block) for block in family}) == 1]
    return [block for family in alike for block in family if block.name in offered]


def _at_equal_cost(
    survey: Survey, blocks: Sequence[Block], widths: Mapping[str, int], config: PruneConfig, work: Workspace
) -> tuple[list[Block], dict[str, int]]:
    target = survey.target(config)
    heads = {b.name: kept for b in blocks if widths[b.name] and (kept := _affordable(b, widths[b.name], target))}
    offered = [b for b in blocks if b.name in heads]
    if not offered:
        return list(blocks), dict(widths)
    even = _is_even(survey, blocks, widths, config)
    if even and not _loads(survey, *_replaced(blocks, widths, heads)):
        return list(blocks), dict(widths)
    gains = work.once("query_heads", lambda: _gains(survey, offered, widths, heads, work))
    families: dict[object, list[str]] = {}
    for block in offered:
        families.setdefault((block.kind, tuple(block.columns.shape)) if even else block.name, []).append(block.name)
    better = {name for family in families.values() if sum(gains[name] for name in family) > 0 for name in family}
    return _replaced(blocks, widths, {name: kept for name, kept in heads.items() if name in better})


def _affordable(block: Block, width: int, target: Target) -> int:
    """Query heads that cost no more than the block's budget, the same number of each group; 0 if there are none."""
    if block.queries is None or block.tie is not None:
        return 0
    # Rounding down to whole key/value heads may have left much of the fraction unused.
    asked = [part.asked for part in target.parts if block.name in part.blocks and part.asked is not None]
    limit = max([target.costs[block.name][width], *(fraction * target.costs[block.name][-1] for fraction in asked)])
    sets, costs = block.queries.sets, target.queries[block.name]
    return max((n for n in range(sets, block.queries.units, sets) if costs[n] <= limit * (1 + 1e-9)), default=0)


def _replaced(
    blocks: Sequence[Block], widths: Mapping[str, int], heads: Mapping[str, int]
) -> tuple[list[Block], dict[str, int]]:
    """The blocks, with query heads as units where their number is given, and the numbers of units that they keep."""
    chosen = [b.queries if b.queries is not None and b.name in heads else b for b in blocks]
    return chosen, {**widths, **heads}


def _is_even(survey: Survey, blocks: Sequence[Block], widths: Mapping[str, int], config: PruneConfig) -> bool:
    """Whether all layers are to have one width that the model's config says."""
    if config.layout == "auto":
        return _loads(survey, blocks, widths)
    return config.layout == "stock"


def _loads(survey: Survey, blocks: Sequence[Block], widths: Mapping[str, int]) -> bool:
    return loads_as_stock(survey.model, blocks, widths, survey.probe)


def _gains(
    survey: Survey, blocks: Sequence[Block], widths: Mapping[str, int], heads: Mapping[str, int], work: Workspace
) -> dict[str, float]:
    """By block name, the logarithm of what whole key/value heads lose over what query heads lose."""
    gains: dict[str, float] = {}
    walk = survey.walk(blocks, "layer", work, beforehand={})
    for segment in walk.left:
        walk.start(segment)
        for block in segment.blocks:
            moments = walk.moments([block]).get(block.name)
            if moments is not None and block.queries is not None and is_mine(survey.owners[block.name]):
                problem = survey.problem(block, moments)
                of_queries = replace(problem, groups=block.queries.columns, sets=block.queries.sets)
                whole = _loss(problem, widths[block.name], survey.settings)
                queries = _loss(of_queries, heads[block.name], survey.settings)
                gains[block.name] = math.log(max(whole, 1e-30) / max(queries, 1e-30))
        walk.finish(segment)
    return {name: gain for theirs in from_all(gains) for name, gain in theirs.items()}


def _loss(problem: Problem, width: int, settings: Settings) -> float:
    choice = choose(problem, width, settings)
    return expected_loss(problem, columns_of(choice.kept, problem.groups), settings)
