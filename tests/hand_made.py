"""Layers of a few linears, to look for blocks in."""

import torch
from torch import nn


class Layers(nn.Module):
    """Hand-made layers on a residual stream."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


class Mlp(nn.Module):
    def __init__(self, width: int = 20, between=None):
        super().__init__()
        self.up, self.down = nn.Linear(12, width), nn.Linear(width, 12)
        self.between = between if between is not None else nn.ReLU()

    def forward(self, x):
        return self.down(self.between(self.up(x)))


class Normalized(nn.Module):
    """Divides by a norm without weights: every column depends on every row, no parameter betrays it."""

    def forward(self, x):
        return x.relu() / (1 + x.norm(dim=-1, keepdim=True))


X = {"x": torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))}
