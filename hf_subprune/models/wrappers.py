"""Objects of other libraries that hold a model of Transformers, and of theirs that are none."""

from typing import Any

from transformers import PreTrainedModel


def taken_out(model: Any, processing_class: Any = None) -> tuple[Any, Any]:
    """The model inside of a wrapper, and what makes its inputs where that was left out; anything else as it is.

    A `SentenceTransformer`, a pipeline of Transformers, and a PEFT wrapper that holds no adapter any more hold a model
    that is pruned where it is, so that the wrapper goes on with it.

    Args:
        model: Anything.
        processing_class: As for `prune`.

    Raises:
        TypeError: an engine of vLLM, whose weights are its own.
    """
    packages = {base.__module__.partition(".")[0] for base in type(model).__mro__}
    if "vllm" in packages:
        raise TypeError(
            f"{type(model).__name__} is an engine of vLLM, which keeps weights in a form of its own: prune the "
            "checkpoint that it was started from, as with `hf-subprune prune NAME --data DATA --out DIR`, and start "
            "vLLM with that folder."
        )
    if "sentence_transformers" in packages and isinstance(
        inside := getattr(model, "transformers_model", None), PreTrainedModel
    ):
        return inside, processing_class or getattr(model, "tokenizer", None)
    if any(base.__module__.startswith("transformers.pipelines") for base in type(model).__mro__):
        names = ("processor", "tokenizer", "image_processor", "feature_extractor")
        made_by = next((part for name in names if (part := getattr(model, name, None)) is not None), None)
        return model.model, processing_class or made_by
    if "peft" in packages and not isinstance(model, PreTrainedModel):
        inside = model.get_base_model()
        if not any(type(module).__module__.startswith("peft.") for module in inside.modules()):
            return inside, processing_class
    return model, processing_class
