"""Other people's way of doing it: what the figures of bench_step.py are compared with.

`PlainTiM` and `public_step` are the network and the finite-difference step as the public code of
the paper arranges them, in plain PyTorch: layer norms, modulation, rotation and gates one operation
at a time, torch's scaled_dot_product_attention, and for the derivative two more forward passes of
the samples with r < t. The code is ours. Parameters have the released names, so both networks load
the same weights, and tests/bench/test_bench_peers.py holds the two to the same numbers.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.profiler import record_function

from tim.bench.step import TRANSPORT, Setup, StepCandidate
from tim.models import TiMConfig
from tim.step import PHASES

EPSILON = 0.005


class SwiGLU(nn.Module):
    def __init__(self, width: int, inner: int, out: int) -> None:
        super().__init__()
        self.fc1_g, self.fc1_x = nn.Linear(width, inner), nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1_g(x)) * self.fc1_x(x))


class TimeEmbedder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        steps = torch.arange(128, dtype=torch.float32, device=t.device)
        angles = t[:, None] * torch.exp(-math.log(10000) * steps / 128)
        embedded = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mlp(embedded.to(self.mlp[0].weight.dtype))


class Attention(nn.Module):
    def __init__(self, config: TiMConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_heads
        self.qkv = nn.Linear(width, 3 * width)
        if config.distance_aware:
            self.qkv_d = nn.Linear(width, 3 * width, bias=False)
        self.q_norm, self.k_norm = (nn.LayerNorm(config.head_dim) for _ in range(2))
        self.proj = nn.Linear(width, width)

    def forward(
        self, x: Tensor, interval: Tensor, rope: tuple[Tensor, Tensor], plain: bool
    ) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x)
        if hasattr(self, "qkv_d"):
            qkv = qkv + self.qkv_d(interval)
        qkv = qkv.reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q = rotated(self.q_norm(q), *rope).to(v.dtype)
        k = rotated(self.k_norm(k), *rope).to(v.dtype)
        if plain:
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
            out = scores.softmax(dim=-1) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, width))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, H, N, D], adjacent channels in pairs."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack([-b, a], dim=-1).flatten(-2) * sin


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class Block(nn.Module):
    def __init__(self, config: TiMConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.attn = Attention(config)
        self.mlp = SwiGLU(width, 4 * width * 2 // 3, width)
        inner = config.lora_hidden_size or width // 4 * 3
        self.adaLN_modulation = SwiGLU(width, inner, 6 * width)

    def forward(
        self, x: Tensor, condition: Tensor, interval: Tensor, rope: tuple, plain: bool
    ) -> Tensor:
        modulation = self.adaLN_modulation(condition).chunk(6, dim=-1)
        shift, scale, gate = modulation[:3]
        x = x + gate * self.attn(modulated(x, shift, scale), interval, rope, plain)
        shift, scale, gate = modulation[3:]
        return x + gate * self.mlp(modulated(x, shift, scale))


class PlainTiM(nn.Module):
    """TiM with class labels, normalised queries and keys, and t - r as its second time."""

    def __init__(self, config: TiMConfig) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.config = config
        self.x_embedder = nn.Module()
        self.x_embedder.proj = nn.Conv2d(config.in_channels, width, patch, stride=patch)
        self.t_embedder = TimeEmbedder(width)
        if config.use_new_embed:
            self.delta_embedder = TimeEmbedder(width)
        self.y_embedder = nn.Module()
        self.y_embedder.embedding_table = nn.Embedding(config.num_classes + 1, width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_layer = nn.Module()
        self.final_layer.linear = nn.Linear(width, patch * patch * config.in_channels)
        self.final_layer.adaLN_modulation = SwiGLU(width, width // 2, 2 * width)

    def forward(
        self, x: Tensor, t: Tensor, r: Tensor, y: Tensor, plain_attention: bool = False
    ) -> Tensor:
        """`plain_attention` stores the scores: fused attention has no forward-mode rule."""
        patch = self.config.patch_size
        rows, columns = x.shape[2] // patch, x.shape[3] // patch
        rope = rope_tables(rows, columns, self.config.head_dim, x.device)
        x = self.x_embedder.proj(x).flatten(2).transpose(1, 2)
        t_embedder = self.t_embedder
        interval = getattr(self, "delta_embedder", t_embedder)(t - r)[:, None]
        condition = t_embedder(t)[:, None] + interval
        condition = condition + self.y_embedder.embedding_table(y)[:, None]
        for block in self.blocks:
            x = block(x, condition, interval, rope, plain_attention)
        shift, scale = self.final_layer.adaLN_modulation(condition).chunk(2, dim=-1)
        x = self.final_layer.linear(modulated(x, shift, scale))
        x = x.reshape(len(x), rows, columns, patch, patch, -1)
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


@functools.cache
def rope_tables(
    rows: int, columns: int, head_dim: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos, sin [N, D]: half of the channels turn with the column, half with the row."""
    quarter = head_dim // 4
    frequencies = 10000.0 ** (-torch.arange(quarter, device=device) / quarter)
    row, column = torch.meshgrid(
        torch.arange(rows, device=device), torch.arange(columns, device=device), indexing="ij"
    )
    angles = torch.cat([p.reshape(-1, 1) * frequencies for p in (column, row)], dim=-1)
    angles = angles.repeat_interleave(2, dim=-1)
    return angles.cos(), angles.sin()


def noised(x: Tensor, z: Tensor, t: Tensor) -> Tensor:
    return (1 - t) * x + t * z


@torch.no_grad()
def public_derivative(
    model: nn.Module, setup: Setup, derivative: str, epsilon: float = EPSILON
) -> Tensor:
    """dF of the second half of the batch, by central differences or by torch.func.jvp."""
    n = len(setup.x) // 2
    x, z, y = (value[n:] for value in (setup.x, setup.z, setup.y))
    t, r = (times[n:, None, None, None] for times in (setup.t, setup.r))

    def network(x: Tensor, t: Tensor, r: Tensor, **options: bool) -> Tensor:
        return model(x, t.flatten(), r.flatten(), y, **options)

    if derivative == "jvp":
        tangents = z - x, torch.ones_like(t), torch.zeros_like(r)
        plain = functools.partial(network, plain_attention=True)
        return torch.func.jvp(plain, (noised(x, z, t), t, r), tangents)[1]
    ahead, behind = (network(noised(x, z, t + e), t + e, r) for e in (epsilon, -epsilon))
    return ahead / (2 * epsilon) - behind / (2 * epsilon)


def public_objective(
    model: nn.Module, setup: Setup, derivative: str = "dde"
) -> tuple[Tensor, Tensor]:
    """The loss and dF; transport ot_fm, time weight sqrt of tan.

    dF by central differences, or by torch.func.jvp in a pass of its own without gradient: both as
    the public code has them.
    """
    x, z, y = setup.x, setup.z, setup.y
    n = len(x) // 2
    t, r = (times[:, None, None, None] for times in (setup.t, setup.r))

    prediction = model(noised(x, z, t), t.flatten(), r.flatten(), y)
    dF = torch.zeros_like(x)
    dF[n:] = public_derivative(model, setup, derivative)
    with torch.no_grad():
        target = z - x - (t - r) * dF
    denoising = (prediction - target).square().mean(dim=(1, 2, 3))
    denoising = denoising + (1 - F.cosine_similarity(prediction, target, dim=1)).mean(dim=(1, 2))
    weight = (torch.tan(setup.t) - torch.tan(setup.r) + TRANSPORT.sigma_d).rsqrt()
    weight[:n] = 1
    return (weight / (denoising.detach() + 1e-5) * denoising).mean(), dF


class PublicStep:
    """A training step arranged as the public code has it, but with the fused AdamW."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.model = PlainTiM(setup.model.config).to(setup.x.device)
        self.model.load_state_dict(setup.model.state_dict())
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, fused=True)

    def objective(self, network: Callable, derivative: str) -> tuple[Tensor, Tensor]:
        with self.setup.autocast():
            return public_objective(network, self.setup, derivative)

    def take(self, network: Callable, derivative: str) -> None:
        with record_function(PHASES[0]):
            loss, _ = self.objective(network, derivative)
        with record_function(PHASES[1]):
            loss.backward()
        with record_function(PHASES[2]):
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        with record_function(PHASES[3]):
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        with record_function(PHASES[4]), torch.no_grad():
            pairs = zip(self.average.parameters(), self.model.parameters(), strict=True)
            for average, parameter in pairs:
                average.mul_(0.9999).add_(parameter, alpha=1e-4)

    def candidate(self, network: Callable, derivative: str) -> StepCandidate:
        return StepCandidate(
            functools.partial(self.objective, network, derivative),
            functools.partial(self.take, network, derivative),
        )


def networks(setup: Setup, compiled: bool) -> dict[str, nn.Module]:
    """The public network, eager and (when asked for) compiled."""
    model = PlainTiM(setup.model.config).to(setup.x.device)
    model.load_state_dict(setup.model.state_dict())
    found = {"public": model}
    if compiled:
        found["public, compiled"] = torch.compile(model, dynamic=False)
    return found


def steps(setup: Setup, compiled: bool) -> dict[str, StepCandidate]:
    """The public step, eager and (when asked for) with torch.compile of its network."""
    public = PublicStep(setup)
    found = {
        f"public {derivative}": public.candidate(public.model, derivative)
        for derivative in ("dde", "jvp")
    }
    if compiled:
        network = torch.compile(public.model, dynamic=False)
        found["public dde, compiled"] = public.candidate(network, "dde")
    return found


def training(setup: Setup, compiled: bool, ranks: int) -> dict[str, StepCandidate]:
    """The public step as it trains: on several ranks with DDP around its network."""
    found = {}
    for name in ("public dde", "public dde, compiled")[: 2 if compiled else 1]:
        public = PublicStep(setup)
        network: nn.Module = public.model
        if name.endswith("compiled"):
            network = torch.compile(network, dynamic=False)
        if ranks > 1:
            network = nn.parallel.DistributedDataParallel(network)
        found[name] = public.candidate(network, "dde")
    return found


def operators(setup: Setup, epsilon: float = EPSILON) -> dict[str, Callable[[], Tensor]]:
    """The public ways to dF alone."""
    model = networks(setup, False)["public"]

    def operator(derivative: str) -> Tensor:
        with setup.autocast():
            return public_derivative(model, setup, derivative, epsilon)

    return {
        f"public {derivative}": functools.partial(operator, derivative)
        for derivative in ("dde", "jvp")
    }
