"""Which programs run a pruned model, and how: a table for its card."""

import re
from collections.abc import Iterator

from .records import Record

_NETWORK_OF_LLAMA = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
_NAMED_BY_LLAMA_CPP = (*_NETWORK_OF_LLAMA, "Qwen3ForCausalLM")
"""Classes that are exported to GGUF: in the ragged layout, and in the stock layout."""

_INSTALL = 'pip install "hf_subprune[export]"'


def runtime_table(report: Record, repo_id: str) -> str:
    """A Markdown table: program, whether and in which form it takes the model, command.

    Args:
        report: From `prune`.
        repo_id: Where the model will be loaded from.
    """
    rows = [(program, how, f"`{command}`" if command else "") for program, how, command in runtimes(report, repo_id)]
    return "\n".join(["| | | |", "| --- | --- | --- |", *(f"| {' | '.join(row)} |" for row in rows)])


def runtimes(report: Record, repo_id: str) -> Iterator[tuple[str, str, str]]:
    """Of each program its name, whether and in which form it takes the model, and the command; `""` for none."""
    name, ragged = repo_id.split("/")[-1], report.layout == "ragged"
    takes = "with `import hf_subprune`, or `trust_remote_code=True`" if ragged else "as it is"
    generates = report.architecture.endswith(("ForCausalLM", "LMHeadModel"))
    serve = f"transformers serve {repo_id}{' --trust-remote-code' if ragged else ''}" if generates else ""
    yield "Transformers, and what builds on it", f"{takes}; any `quantization_config` on top", serve
    if generates:
        yield "llama.cpp", *_llama_cpp(report, repo_id, name)
        yield "vLLM", *_vllm(report, repo_id, name)
    command = f"hf-subprune export {repo_id} --to onnx --out {name}.onnx"
    yield "ONNX Runtime", f"exported, one forward without a cache ({_INSTALL})", command


def _llama_cpp(report: Record, repo_id: str, name: str) -> tuple[str, str]:
    ragged = report.layout == "ragged"
    if report.architecture in (_NETWORK_OF_LLAMA if ragged else _NAMED_BY_LLAMA_CPP):
        command = f"hf-subprune export {repo_id} --to gguf --out {name}.gguf"
        return f"exported to GGUF{', as `deci`' if ragged else ''} ({_INSTALL})", command
    if ragged:
        return "no: it has widths by layer for the network of Llama only", ""
    return "if its `convert_hf_to_gguf.py` knows the architecture", ""


def _vllm(report: Record, repo_id: str, name: str) -> tuple[str, str]:
    if report.layout != "ragged":
        return "as it is, if it takes the architecture", f"vllm serve {repo_id}"
    if report.architecture in _NETWORK_OF_LLAMA and _query_heads_are_alike(report):
        command = f"hf-subprune export {repo_id} --to vllm --out {name}-vllm"
        return "exported, as `nemotron-nas`; then `vllm serve` with `--trust-remote-code`", command
    return "no: it takes as many query heads in each layer, in the network of Llama", ""


def _query_heads_are_alike(report: Record) -> bool:
    """Whether all layers that have attention have as many query heads."""
    kept: dict[str, set[int]] = {}
    for block in report.blocks:
        if block.kind == "attention" and block.units_after:
            kept.setdefault(re.sub(r"\d+", "*", block.name), set()).add(block.units_after)
    return all(len(numbers) == 1 for numbers in kept.values())
