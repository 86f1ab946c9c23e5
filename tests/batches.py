"""Ready calibration batches for tiny models, with padding where there are tokens."""

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from hf_subprune.collection.additions import first_tensor
from hf_subprune.discovery.probe_inputs import probe_inputs
from hf_subprune.models.linears import is_convolution
from hf_subprune.models.running import call


def ready_batches(model: PreTrainedModel, count: int = 6, rows: int = 4, seed: int = 0) -> list[dict]:
    """`count` different batches of `rows` samples for any family of `tiny`."""
    like = probe_inputs(model)
    generator = torch.Generator().manual_seed(seed)
    return [{name: _another(name, value, rows, generator) for name, value in like.items()} for _ in range(count)]


def _another(name: str, like: torch.Tensor, rows: int, generator: torch.Generator) -> torch.Tensor:
    shape = (rows, *like.shape[1:])
    if "mask" in name:
        mask = torch.ones(shape, dtype=like.dtype)
        if mask.ndim == 2:
            for row in range(rows):
                mask[row, mask.shape[1] - row % 3 :] = 0
        return mask
    if like.is_floating_point():
        return torch.randn(shape, generator=generator)
    return torch.randint(5, int(like.max()) + 1, shape, generator=generator)


def rows(model, calibration, path, output=False):
    """What reaches (or leaves) a module at the real tokens of the batches fitted on, by plain forwards."""
    seen = []
    module = model.get_submodule(path)
    hook = module.register_forward_hook(lambda _m, args, out: seen.append(first_tensor(out if output else args)))
    for batch in calibration.fit:
        call(model, batch)
    hook.remove()
    calls = len(seen) // len(calibration.fit)  # more than one where layers share the module
    parts = []
    for i, x in enumerate(seen):
        if is_convolution(module):
            x = x.flatten(2).mT if output else unfolded(module, x)
        mask = calibration.mask(x.shape, i // calls, path)
        x = x.reshape(-1, x.shape[-1])
        parts.append(x if mask is None else x[mask])
    return torch.cat(parts).detach().double()


def unfolded(module, x):
    """Every patch that a convolution reads, `(batch, positions, n)`."""
    sizes = [module.kernel_size, module.dilation, module.padding, module.stride]
    if x.ndim == 3:
        x, sizes = x.unsqueeze(2), [(first, *size) for first, size in zip((1, 1, 0, 1), sizes, strict=True)]
    return functional.unfold(x, *sizes).mT
