"""Whether a pruned model is as much faster as its multiply-accumulates promise."""

import copy
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from rich.table import Table
from transformers import PreTrainedModel

from ..config import PruneConfig
from ..evaluation.costs import count_macs, measure_in_turn
from ..models.running import Batch
from ..pruning import prune_sizes


def bench_latency(
    model: PreTrainedModel,
    data: Any,
    configs: Sequence[PruneConfig],
    processing_class: Any = None,
    *,
    batch_size: int = 32,
    length: int = 128,
    rounds: int = 10,
) -> list[dict[str, Any]]:
    """Time the original and a copy pruned to each config in turn.

    Args:
        model: Takes `input_ids` and `attention_mask`; left as it is.
        data: To calibrate on.
        configs: As for `prune_sizes`.
        processing_class: As for `prune`.
        batch_size: Samples in the batch that is timed.
        length: Tokens of each.
        rounds: Forwards of each model.

    Returns:
        One row per config: `layout`, `promised` (original over pruned multiply-accumulates), `speedup` (median of the
        rounds' ratios of wall time), `share` (`speedup / promised`), `seconds` (medians, original and pruned),
        `threads`.
    """
    vocabulary = len(model.get_input_embeddings().weight)  # type: ignore[arg-type]
    ids = torch.randint(vocabulary, (batch_size, length))
    batch: Batch = {"input_ids": ids.to(model.device), "attention_mask": torch.ones_like(ids).to(model.device)}
    pruned = [copy.deepcopy(model) for _ in prune_sizes(model, data, configs, processing_class)]
    times = measure_in_turn([model, *pruned], batch, rounds)
    rows = []
    for i, (config, other) in enumerate(zip(configs, pruned, strict=True), 1):
        promised = count_macs(model, batch) / count_macs(other, batch)
        speedup = statistics.median(row[0] / row[i] for row in times)
        rows.append(
            {
                "layout": config.layout,
                "round_to": config.round_to,
                "promised": promised,
                "speedup": speedup,
                "share": speedup / promised,
                "seconds": [statistics.median(row[j] for row in times) for j in (0, i)],
                "threads": torch.get_num_threads(),
            }
        )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows as a rich table."""
    shown = Table(title="Speed of pruned models against what their MACs promise", title_justify="left")
    for name in ("layout", "round_to", "MACs promise", "measured", "share", "ms before", "ms after"):
        shown.add_column(name, justify="left" if name == "layout" else "right")
    for row in rows:
        before, after = (f"{1e3 * seconds:.0f}" for seconds in row["seconds"])
        figures = [f"{row[name]:.2f} x" for name in ("promised", "speedup")]
        shown.add_row(row["layout"], str(row["round_to"] or ""), *figures, f"{row['share']:.0%}", before, after)
    shown.caption = f"{rows[0]['threads']} threads; medians of forwards in turn."
    shown.caption_justify = "left"
    return shown
