"""Networks that denoise action chunks: a conditional 1-D U-Net and a transformer with adaptive layer norm."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

GROUPS = 8
HEAD_SIZE = 64


class TimeEmbedding(nn.Module):
    """Noise level in [0, 1] to a vector: sinusoids (Vaswani et al. 2017), then a perceptron."""

    frequencies: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        # Periods from 2π to 2π/1000 of the unit interval.
        frequencies = torch.exp(torch.linspace(0, math.log(1000.0), half))
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.network = nn.Sequential(nn.Linear(2 * half, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, time: Tensor) -> Tensor:
        angles = time.float()[:, None] * self.frequencies
        return self.network(torch.cat([angles.sin(), angles.cos()], dim=-1))


class ConditionalBlock(nn.Module):
    """Two 1-D convolutions; the condition scales and shifts the features between them (FiLM, Perez et al. 2018)."""

    def __init__(self, inputs: int, outputs: int, condition: int) -> None:
        super().__init__()
        self.first = nn.Conv1d(inputs, outputs, 5, padding=2)
        self.first_norm = nn.GroupNorm(GROUPS, outputs)
        self.film = nn.Linear(condition, 2 * outputs)
        self.second = nn.Conv1d(outputs, outputs, 5, padding=2)
        self.second_norm = nn.GroupNorm(GROUPS, outputs)
        self.shortcut = nn.Conv1d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, sequence: Tensor, condition: Tensor) -> Tensor:
        hidden = functional.silu(self.first_norm(self.first(sequence)))
        scale, shift = self.film(condition)[..., None].chunk(2, dim=1)
        hidden = torch.addcmul(shift, hidden, 1 + scale)
        hidden = functional.silu(self.second_norm(self.second(hidden)))
        return hidden + self.shortcut(sequence)


class UNet(nn.Module):
    """Conditional 1-D U-Net over the time axis of the chunk (Janner et al. 2022; Chi et al. 2023, §III).

    Args:
        action_dim: size of an action.
        condition_dim: size of the observation vector.
        widths: channels per level; each further level halves the time axis.
    """

    def __init__(self, action_dim: int, condition_dim: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        time_width = 128
        self.time = TimeEmbedding(time_width)
        condition = time_width + condition_dim
        self.down = nn.ModuleList()
        self.shrink = nn.ModuleList()
        inputs = action_dim
        for level, outputs in enumerate(widths):
            self.down.append(ConditionalBlock(inputs, outputs, condition))
            last = level == len(widths) - 1
            self.shrink.append(nn.Identity() if last else nn.Conv1d(outputs, outputs, 3, 2, 1))
            inputs = outputs
        self.middle = ConditionalBlock(inputs, inputs, condition)
        self.grow = nn.ModuleList()
        self.up = nn.ModuleList()
        for outputs in reversed(widths[:-1]):
            self.grow.append(nn.ConvTranspose1d(inputs, outputs, 4, 2, 1))
            self.up.append(ConditionalBlock(2 * outputs, outputs, condition))
            inputs = outputs
        self.output = nn.Conv1d(inputs, action_dim, 1)

    def forward(self, actions: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        """Return the prediction ``(N, T, A)`` for noisy actions ``(N, T, A)``, time ``(N,)`` and ``(N, C)``."""
        fused = functional.silu(torch.cat([self.time(time), condition], dim=-1))
        hidden = actions.transpose(1, 2)
        skips = []
        for block, shrink in zip(self.down, self.shrink, strict=True):
            hidden = block(hidden, fused)
            skips.append(hidden)
            hidden = shrink(hidden)
        hidden = self.middle(hidden, fused)
        skips.pop()
        for grow, block in zip(self.grow, self.up, strict=True):
            hidden = block(torch.cat([grow(hidden), skips.pop()], dim=1), fused)
        return self.output(hidden).transpose(1, 2)


class AdaptiveBlock(nn.Module):
    """Transformer layer whose norms are modulated by the condition (DiT adaLN-Zero, Peebles & Xie 2023)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // HEAD_SIZE
        self.modulation = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)
        self.attention_norm = nn.LayerNorm(width, elementwise_affine=False)
        self.project_in = nn.Linear(width, 3 * width)
        self.project_out = nn.Linear(width, width)
        self.feed_norm = nn.LayerNorm(width, elementwise_affine=False)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = self.modulation(condition)[:, None].chunk(6, dim=-1)
        hidden = self.attention_norm(tokens) * (1 + scale_a) + shift_a
        count, length, width = hidden.shape
        heads = self.project_in(hidden).view(count, length, 3, self.heads, HEAD_SIZE).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(heads[0], heads[1], heads[2])
        attended = attended.transpose(1, 2).reshape(count, length, width)
        tokens = tokens + gate_a * self.project_out(attended)
        hidden = self.feed_norm(tokens) * (1 + scale_f) + shift_f
        return tokens + gate_f * self.feed(hidden)


class Transformer(nn.Module):
    """One token per action; time and observation enter through adaptive layer norm.

    Args:
        action_dim: size of an action.
        condition_dim: size of the observation vector.
        horizon: actions per chunk.
        width, layers: size of the tokens and depth.
    """

    def __init__(self, action_dim: int, condition_dim: int, horizon: int, width: int, layers: int) -> None:
        super().__init__()
        self.time = TimeEmbedding(width)
        self.condition = nn.Linear(condition_dim, width)
        self.embed = nn.Linear(action_dim, width)
        self.position = nn.Parameter(0.02 * torch.randn(1, horizon, width))
        self.layers = nn.ModuleList(AdaptiveBlock(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, action_dim)

    def forward(self, actions: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        """Return the prediction ``(N, T, A)`` for noisy actions ``(N, T, A)``, time ``(N,)`` and ``(N, C)``."""
        fused = functional.silu(self.time(time) + self.condition(condition))
        tokens = self.embed(actions) + self.position
        for layer in self.layers:
            tokens = layer(tokens, fused)
        return self.output(self.norm(tokens))
