"""Tiny randomly initialised models of every architecture that the installed Transformers knows.

A configuration class documents its own layout: its fields, their defaults and its sub-configurations. The defaults are
consistent with one another, so they are shrunk by *role* (a width, a number of heads, a number of layers, a token id),
which a field's name and default tell, and never by the name of the model.
"""

import math
import re
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from .architectures import model_class

WIDTH, INNER, HEADS, KEY_VALUE_HEADS, HEAD_DIM, VOCABULARY, POSITIONS = 64, 96, 4, 2, 16, 128, 512
EXPERTS, LAYERS, QUERIES, FRAMES, PATCHES = 4, 2, 8, 64, 4
USUAL_HEAD_DIM = 64
"""Width of a head where a model of images has no number of heads: it is made for this one."""
LARGE_IMAGE = 480
"""Pixels of a side above which a model is made for large images."""
MOST_LAYERS = 8
"""Layers that a model may have to show all types of layers."""
MOST_PARAMETERS = 20_000_000
"""Parameters above which a model is no longer tiny: it is refused before it is allocated."""

Rule = Callable[[Any], Any]


def at_most(bound: int) -> Rule:
    """Rule that caps an integer, or each integer of a list."""
    return lambda value: [min(v, bound) for v in value] if is_list(value) else min(value, bound)


def keep(value: Any) -> Any:
    """Rule that leaves a value as it is."""
    return value


def width(tiny: int) -> Rule:
    """Rule for a number of features: `tiny`, and for one width per stage an eighth of each.

    Small numbers (image channels, multipliers) are not widths and stay.
    """

    def shrink(value: Any) -> Any:
        if is_list(value) and len(set(value)) > 1:
            return [eighth(v) for v in value]
        if is_list(value):
            return [shrink(v) for v in value]
        return tiny if value > 16 else value

    return shrink


def eighth(value: int) -> int:
    """A width divided by eight, which keeps ratios, sums and equalities between widths; small numbers stay."""
    return max(value // 8, 2) if value >= 16 else value


def heads(value: Any) -> Any:
    """Rule for a number of attention heads; heads per stage stay in proportion to their widths."""
    return value if is_list(value) else min(value, HEADS)


def window(value: Any) -> Any:
    """Rule for windows of attention, which must not outgrow tiny images; those given in pixels or by stage stay."""
    return value if is_list(value) or value > 32 else min(value, 2)


# The first pattern found in a field's name gives its role.
RULES: tuple[tuple[str, Rule], ...] = (
    (r"(_|^)(kernel|stride|padding|dilation|ratio|factor|scale|rate|coefficient|cost|weight|theta|temperature)", keep),
    (r"(kernel|stride|padding|dilation|ratio|factor|scale)s?(_|$)|_rates?$|group_norm|base$|_mult$|multiple", keep),
    (r"window_size", window),
    (r"num_groups$", at_most(2)),
    (r"rotary_dim", width(HEAD_DIM)),
    (r"vocab_size|num_embeddings$|num_buckets$|codebook_size|num_res_types", at_most(VOCABULARY)),
    (r"key_value_heads|kv_heads|num_key_heads|num_kv", at_most(KEY_VALUE_HEADS)),
    (r"(head_dim|d_kv|dim_head|d_head|head_size|kv_channels)$", width(HEAD_DIM)),
    (r"(^|_)(heads?|nhead)$|num_.*heads", heads),
    (r"experts_per_tok|topk_group|moe_topk|moe_k$|top_k", at_most(2)),
    (r"n_groups?$|num_expert_group", at_most(2)),
    (r"experts?$|experts_num|expert_num$|num_experts|local_experts", at_most(EXPERTS)),
    (r"max_position|n_positions|position_embeddings|max_seq|n_ctx|context_length", at_most(POSITIONS)),
    (r"depths|num_block_repeats|stage_num|layer_depth|blocks_per_stage", at_most(2)),
    (r"(layers?|depth|blocks|num_hidden_groups|self_attends_per_block)$", at_most(LAYERS)),
    (
        r"num_queries|num_proposals|num_latents|hash_byte_group_vocab|query_num|num_query_tokens|num_prototypes",
        at_most(QUERIES),
    ),
    (r"source_positions|max_length|num_frames|frames_per_clip|train_num_points|index_topk", at_most(FRAMES)),
    (r"lora_rank|_rank$", at_most(WIDTH // 4)),
    (r"intermediate|ffn|d_ff|dff|dim_ff|mlp_dim|mlp_hidden|feed_?forward|inner|linear_units", width(INNER)),
    (r"n(um)?_filters$", width(WIDTH // 8)),
    (r"num_pos_feats", width(WIDTH // 2)),
    (r"hidden|emb|d_model|dim|width|channel|latents|feature_size|_size_global|planes|descriptor|units", width(WIDTH)),
    (
        r"upsample_groups|projection|proj_size",
        width(WIDTH),
    ),
)
# What the names of fields with a role of their own look like.
TOKEN_ID = re.compile(r"(token_?|(^|_)(bos|eos|pad|unk|mask|im_start|im_end|newline)_)(id|index|ids)$")
LAYER_INDEX = re.compile(r"(index(es)?|indices|layer_ids?|hook_ids|idxs?|layers_ids)$")
LAYER_POSITION = re.compile(r"insert_layer|first_k_dense|num_dense_layers|layer_start_index")
KEY_VALUE = re.compile(r"key_value_heads|kv_heads")
OUTPUTS = ("out_indices", "out_features")
# Fields whose default is None though models cannot do without.
NEEDED = {
    "vocab_size": VOCABULARY,
    "head_dim": HEAD_DIM,
    "num_key_value_heads": KEY_VALUE_HEADS,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": INNER,
    "sliding_window": FRAMES,
    "pad_token_id": 0,
    "image_token_index": VOCABULARY - 1,
    "image_token_id": VOCABULARY - 1,
}
IMAGE_SIZE = re.compile(r"image_size|img_size|input_size|crop_size|resolution")
NO_CLASS = "Transformers has no"


class CannotBuildError(Exception):
    """Raised when no tiny model of a type could be built; the message says why."""


def tiny_model(
    model_type: str, head: str = "base", seed: int = 0, most_parameters: int = MOST_PARAMETERS
) -> PreTrainedModel:
    """A tiny randomly initialised model of one type, in evaluation mode, float32, on the CPU.

    Args:
        model_type: Key of `transformers.CONFIG_MAPPING`, e.g. `"bert"`.
        head: `"base"` for the bare model, `"main"` for the class with the type's main head.
        seed: Of the weights. The global random state is left as it was.
        most_parameters: A model of more is refused.

    Raises:
        CannotBuildError: If there is no such class, or its configuration could not be shrunk.
    """
    try:
        config = tiny_config(model_type)
    except Exception as error:
        raise CannotBuildError(f"{model_type}: no tiny configuration: {first_line(error)}") from error
    architecture = model_class(type(config), head)
    if architecture is None:
        raise CannotBuildError(f"{model_type}: {NO_CLASS} {head} class for {type(config).__name__}")
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            with torch.device("meta"):
                size = sum(p.numel() for p in architecture(config).parameters())
            if size > most_parameters:
                raise CannotBuildError(f"{model_type}: the tiny configuration still has {size} parameters")
            model = architecture(config)
            scatter_weights(model)
    except CannotBuildError:
        raise
    except Exception as error:
        raise CannotBuildError(
            f"{model_type}: {architecture.__name__} failed to build: {first_line(error)}"
        ) from error
    return model.eval()


def first_line(error: BaseException) -> str:
    """Class and first line of an error, or of the one that caused it."""
    error = error.__cause__ or error
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


@torch.no_grad()
def scatter_weights(model: torch.nn.Module) -> None:
    """Give every parameter values whose effect shows in the output.

    Many models start layers at zero or scale residual branches by 1e-6, which would hide a wrong removal. Matrices are
    drawn from N(0, 1 / fan_in); vectors that are constant (biases, norms, layer scales) are moved by N(0, 0.1^2).
    """
    convolution = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if not parameter.is_floating_point():
                continue
            if parameter.dim() >= 2:
                fan_in = math.prod(parameter.shape[1:]) if isinstance(module, convolution) else parameter.shape[-1]
                parameter.normal_(0.0, fan_in**-0.5)
            elif parameter.numel() and bool((parameter == parameter.flatten()[0]).all()):
                parameter.add_(torch.randn_like(parameter), alpha=0.1)


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The configuration of a type with its sizes shrunk and its structure kept (see the module's docstring).

    Raises whatever the configuration class raises if it refuses the sizes.
    """
    return shrink_config(CONFIG_MAPPING[model_type], {})


def shrink_config(config_class: type[PreTrainedConfig], given: dict[str, Any]) -> PreTrainedConfig:
    """A tiny `config_class`; `given` are arguments that its owner would have passed."""
    given = {**given, "use_cache": False} if "use_cache" in field_defaults(config_class) else given
    config = config_class(**tiny_arguments(config_class, given))
    fit_rotary_sections(config)
    return config


def tiny_arguments(config_class: type[PreTrainedConfig], given: dict[str, Any]) -> dict[str, Any]:
    """Arguments that make a tiny `config_class`; `given` are arguments that its owner would have passed."""
    defaults = {**field_defaults(config_class), **given}
    full = config_class(**given)
    defaults.update(
        {name: vars(full)[name] for name in per_stage_fields(config_class, full) if defaults[name] is None}
    )
    arguments = {name: shrink_field(name, value, defaults) for name, value in defaults.items()}
    arguments = {name: value for name, value in arguments.items() if name in given or value != defaults[name]}
    for name, spec in config_class.sub_configs_defaults.items():
        if not (defaults.get(name) is None and spec.optional):
            arguments[name] = tiny_sub_config(spec, defaults.get(name))
    rope = vars(full).get("rope_parameters")
    if isinstance(rope, dict) and "mrope_section" in rope and "qk_rope_head_dim" in arguments:
        # Such a class checks the sections when it is made, against this part of a head.
        arguments["rope_parameters"] = {**rope, "mrope_section": rotary_sections(arguments["qk_rope_head_dim"])}
    return with_layer_pattern(config_class, given, full, arguments)


def field_defaults(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """Defaults of the fields that a configuration class adds to `PreTrainedConfig`."""
    common = {field.name for field in fields(PreTrainedConfig)}
    defaults = {}
    for field in fields(config_class):
        if field.name in common:
            continue
        if field.default is not MISSING:
            defaults[field.name] = field.default
        elif field.default_factory is not MISSING:
            defaults[field.name] = field.default_factory()
    return defaults


def per_stage_fields(config_class: type[PreTrainedConfig], full: PreTrainedConfig) -> list[str]:
    """Fields in which a configuration writes one number per stage by itself when it is given none."""
    depth = getattr(full, "num_hidden_layers", None)
    names = [name for name in field_defaults(config_class) if re.search(r"stage|hidden_sizes|depths|channel", name)]
    lists = {name: vars(full)[name] for name in names if is_list(vars(full).get(name))}
    return [name for name, value in lists.items() if len(value) != depth]


def shrink_field(name: str, value: Any, defaults: dict[str, Any]) -> Any:
    """Tiny value of one field; `defaults` are the values of its siblings, to which some roles refer."""
    if isinstance(value, (bool, float, str, dict)) or value is None:
        return value
    if name == "image_grid_pinpoints" and value:
        side = tiny_image_side(16)
        return [[side, 2 * side], [2 * side, side]]
    numbers = value if is_list(value) else [value]
    if not numbers or not all(isinstance(v, int) and not isinstance(v, bool) for v in numbers):
        return value
    if TOKEN_ID.search(name):
        return type(value)(map(tiny_id, value)) if is_list(value) else tiny_id(value)
    if IMAGE_SIZE.search(name):
        patch = defaults.get("patch_size") or 16
        side = tiny_image_side(patch if isinstance(patch, int) else max(patch))
        # Where stages or a neck halve the image again and again, the last one is to see more than one position.
        if is_list(defaults.get("hidden_sizes")) or max(numbers) > LARGE_IMAGE:
            side *= 2
        return type(value)(min(v, side) for v in value) if is_list(value) else min(value, side)
    if name == "num_attention_heads" and is_list(defaults.get("hidden_sizes")):
        return at_most(2)(value)
    of_image_layers = {"patch_size", "num_hidden_layers"} <= defaults.keys()
    if name == "hidden_size" and of_image_layers and not any("head" in field for field in defaults):
        return HEADS * USUAL_HEAD_DIM
    if KEY_VALUE.search(name) and value == defaults.get("num_attention_heads"):
        return heads(value)
    for pattern, rule in RULES:
        if re.search(pattern, name):
            shrunk = staged_width(value, defaults) if is_staged_width(name, value, defaults) else rule(value)
            return type(value)(shrunk) if is_list(value) else shrunk
    return value


def is_staged_width(name: str, value: Any, defaults: dict[str, Any]) -> bool:
    """Whether a width is that of the first stage of a vision model, from which the others follow by fixed ratios."""
    stages = (defaults.get(sibling) for sibling in ("depths", "num_heads", "block_sizes", "embed_dim_per_stage"))
    return isinstance(value, int) and name in ("embed_dim", "hidden_size") and any(map(is_list, stages))


def staged_width(value: int, defaults: dict[str, Any]) -> int:
    """An eighth of a first stage's width, rounded up to a multiple of its number of heads."""
    first = defaults["num_heads"][0] if is_list(defaults.get("num_heads")) else 4
    return math.ceil(value / 8 / first) * first


def is_list(value: Any) -> bool:
    """Whether a field holds several values."""
    return isinstance(value, (list, tuple))


def tiny_id(token: int) -> int:
    """Image of a token id in the tiny vocabulary; equal ids stay equal, neighbours stay different."""
    return token if token < VOCABULARY // 2 else VOCABULARY // 2 + token % (VOCABULARY // 2 - 1)


def tiny_image_side(patch: int) -> int:
    """Pixels of a side: a power of two of patches, at least `PATCHES`, about 64 pixels where that is more."""
    return patch * max(PATCHES, 2 ** int(math.log2(max(64 / patch, 1))))


def fit_rotary_sections(config: PreTrainedConfig) -> None:
    """Rotary sections (one per position axis) that sum to half the rotated width of a head, where there are any."""
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, dict) or "mrope_section" not in getattr(config, "ignore_keys_at_rope_validation", ()):
        return
    head_dim = vars(config).get("head_dim") or config.hidden_size // config.num_attention_heads
    rope["mrope_section"] = rotary_sections(int(head_dim * rope.get("partial_rotary_factor", 1.0)))


def rotary_sections(width: int) -> list[int]:
    """Three sections that sum to half of a rotated width."""
    half = width // 2
    return [half - 2 * (half // 3), half // 3, half // 3]


def tiny_sub_config(spec: Any, given: Any) -> PreTrainedConfig:
    """A tiny sub-configuration, of the type that its owner's specification names by default."""
    given = dict(given) if isinstance(given, dict) else dict(spec.init_kwargs)
    model_type = given.pop("model_type", spec.model_type)
    concrete = issubclass(spec.config_class, PreTrainedConfig)
    config_class = spec.config_class if concrete else CONFIG_MAPPING[model_type]
    return shrink_config(config_class, given)


def with_layer_pattern(
    config_class: type[PreTrainedConfig], given: dict[str, Any], full: PreTrainedConfig, arguments: dict[str, Any]
) -> dict[str, Any]:
    """Arguments with just enough layers to show every type of layer (full and sliding attention, dense and sparse).

    Lists with one entry per layer are cut to the same length, lists of layer indices are moved into it.
    """
    depth = config_class.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    defaults = {**field_defaults(config_class), **given}
    unset = {name: value for name, value in NEEDED.items() if name in defaults and vars(full).get(name, 0) is None}
    arguments = {**arguments, **unset}
    if not isinstance(defaults.get(depth), int):
        return arguments
    patterns = layer_patterns(full, defaults[depth])
    wanted = {name: set(value) for name, value in patterns.items() if len(set(value)) <= LAYERS + 1}
    fewest = max([LAYERS, *(len(defaults[name]) for name in OUTPUTS if defaults.get(name))])
    chosen, refusal = None, None
    for layers in range(min(fewest, defaults[depth]), MOST_LAYERS + 1):
        candidate = {**arguments, depth: layers}
        candidate.update({name: defaults[name][:layers] for name in patterns if defaults.get(name) is not None})
        for name, value in defaults.items():
            candidate.update(layer_positions(name, value, layers))
        try:
            shown = layer_patterns(config_class(**candidate), layers)
        except Exception as error:  # a class may refuse a depth and take another
            refusal = refusal or error
            continue
        chosen = chosen or candidate
        if all(set(shown.get(name, ())) >= types for name, types in wanted.items()):
            return candidate
    if chosen is None:
        assert refusal is not None
        raise refusal
    return chosen


def layer_patterns(config: PreTrainedConfig, layers: int) -> dict[str, list[str]]:
    """Attributes and properties of a configuration that hold one entry per layer."""
    names = [name for name in dir(type(config)) if re.search(r"layers?_\w*types?$", name)]
    computed = {name: getattr(config, name, None) for name in names}
    return {
        name: [str(one) for one in value]
        for name, value in {**computed, **vars(config)}.items()
        if is_list(value) and len(value) == layers
    }


def layer_positions(name: str, value: Any, layers: int) -> dict[str, Any]:
    """The field `name` with indices of layers moved into `range(layers)`; empty if it holds none."""
    if name in OUTPUTS and value:
        first = layers - len(value) + 1
        stages = range(first, layers + 1)
        return {name: list(stages) if isinstance(value[0], int) else [f"stage{stage}" for stage in stages]}
    if is_list(value) and LAYER_INDEX.search(name) and all(isinstance(v, int) for v in value):
        return {name: sorted({min(v, layers - 1) for v in value})}
    if name == "attention_types" and value is None:
        return {name: [[["global", "local"], layers // 2]]}
    if isinstance(value, int) and not isinstance(value, bool) and LAYER_POSITION.search(name):
        return {name: min(value, layers - 1)}
    return {}
