"""The TiM network: F = F_theta(x_t, t, r, y), for class labels and captions alike."""

# No postponed annotations here: the hub mixin reads the class of `config` from the signature.

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from tim._checks import check_floating, check_tensor
from tim.models.blocks import (
    Block,
    FinalLayer,
    Prepared,
    add_update,
    can_prepare,
    norm_without_parameters,
    prepare,
)
from tim.models.config import TiMConfig
from tim.models.embeddings import CaptionEmbedder, LabelEmbedder, PatchEmbedder, TimeEmbedder
from tim.models.hub import HubMixin
from tim.models.layers import Linear, SiLU
from tim.models.rope import rope_tables
from tim.ops import pairs
from tim.ops.pairs import Operand, Pair


class TiM(
    nn.Module,
    HubMixin,
    library_name="transition-models",
    paper_url="https://arxiv.org/abs/2509.04394",
    tags=["transition-models", "image-generation"],
):
    """Transition network of TiM (arXiv 2509.04394, sec. 3), parameters named as in released files.

    `torch.func.jvp` of the network is exact: it returns F and its derivative along the tangents of
    x and t. The derivative keeps no autograd graph while F keeps its own.

    Attributes:
        config: the `TiMConfig` it was built from.
        gradient_checkpointing: recompute each block in the backward pass instead of storing its
            activations. Passes without gradient, and passes with forward-mode tangents, for which
            PyTorch cannot recompute, ignore it; with it, give `tangents` as an argument.
        takes_tangents: that there is such an argument; for callers that do not know the class.

    Initialisation: linear layers Xavier-uniform with zero bias; embedders of t, labels and captions
    normal with std 0.02; the last layer of every modulation and of the network zero, so that each
    block starts as the identity and the network at F = 0 (adaLN-Zero, arXiv 2212.09748).
    """

    takes_tangents = True

    def __init__(self, config: TiMConfig) -> None:
        super().__init__()
        if not isinstance(config, TiMConfig):
            raise TypeError(f"config must be a TiMConfig, got {type(config).__name__}")
        self.config = config
        self.gradient_checkpointing = False
        width, patch, channels = config.hidden_size, config.patch_size, config.in_channels
        self.x_embedder = PatchEmbedder(patch, channels, width)
        self.t_embedder = TimeEmbedder(width)
        if config.use_new_embed:
            self.delta_embedder = TimeEmbedder(width)
        if config.num_classes is None:
            self.y_embedder = CaptionEmbedder(config.cap_feat_dim, width)
        else:
            self.y_embedder = LabelEmbedder(config.num_classes, width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        if config.z_dim is not None:
            self.projector = nn.Sequential(
                Linear(width, config.projector_dim),
                SiLU(),
                Linear(config.projector_dim, config.projector_dim),
                SiLU(),
                Linear(config.projector_dim, config.z_dim),
            )
        self.final_layer = FinalLayer(width, patch * patch * channels)
        self._initialise()

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        r: Tensor,
        y: Tensor,
        return_features: bool = False,
        tangents: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """F_theta(x, t, r, y).

        Args:
            x: [B, C, H, W] noisy latents, H and W any multiples of patch_size.
            t, r: [B] times as the network sees them, c_noise(t) and c_noise(r); best in float32
                or wider, whatever the dtype of the parameters.
            y: [B] integer labels (num_classes is the null label), or [B, M, cap_feat_dim] caption
                features. There is no text mask.
            return_features: also return the projection head's output after block `encoder_depth`.
            tangents: of x [T, C, H, W] and t [T] of the last T <= B samples: also return the
                derivative dF along them. One pass, for which `torch.func.jvp` would need another
                one for the samples without tangents; works with `gradient_checkpointing`.

        Returns:
            F: [B, C, H, W], or as a tuple F, features [B, N, z_dim] with N = (H / p) (W / p), and
            dF [T, C, H, W], without graph; in the dtype of the parameters, or that of autocast.
            x and captions are converted to it.

        Raises:
            ValueError: a shape does not fit, or features are asked of a network without z_dim.
            TypeError: an argument is no tensor, x, t, r or captions are not floating-point, or
                labels not integers.
        """
        self._check(x, t, r, y, return_features)
        if tangents is not None:
            x, t = self._with_tangents(x, t, r, y, tangents)
            F, features = self._run(x, t, r, y, return_features, moving_features=False)
            return (F.primal, features, F.tangent) if return_features else (F.primal, F.tangent)
        duals = pairs.of_duals(
            (x, t, r, y) if y.is_floating_point() else (x, t, r), self.parameters()
        )
        if duals is None:
            out, features = self._run(x, t, r, y, return_features)
        else:
            out, features = (
                None if operand is None else pairs.as_dual("the network", operand)
                for operand in self._run(*duals, *(x, t, r, y)[len(duals) :], return_features)
            )
        return (out, features) if return_features else out

    def _run(
        self,
        x: Operand,
        t: Operand,
        r: Operand,
        y: Operand,
        return_features: bool,
        moving_features: bool = True,
    ) -> tuple[Operand, Operand | None]:
        """F and features; the latter without tangents unless `moving_features`."""
        config = self.config
        rows, columns = (size // config.patch_size for size in _values(x).shape[2:])
        dtype = self.x_embedder.proj.weight.dtype
        tokens = self.x_embedder(pairs.each(lambda x: x.to(dtype), x))
        condition, interval = self._embed_times(t, r)
        text = None
        if config.num_classes is None:
            text = norm_without_parameters(self.y_embedder(y))
        else:
            condition = pairs.add(condition, self.y_embedder(y)[:, None])
        rope = rope_tables(
            rows, columns, config.head_dim, config.rope_grid,
            scaling=config.rope_scaling, decouple=config.rope_decouple,
            train_size=config.rope_train_size or config.input_size // config.patch_size,
            device=_values(x).device,
            dtype=torch.promote_types(_values(tokens).dtype, torch.float32),
        )  # fmt: skip

        conditions = (condition, interval, text, rope)
        prepared: list[Prepared | None] = [None] * len(self.blocks)
        if can_prepare(self.blocks):
            prepared = prepare(self.blocks, condition, interval)
        checkpoints = self._checkpoints(x, t, r)
        update, features = None, None
        for number, block in enumerate(self.blocks, start=1):
            arguments = (*conditions, prepared[number - 1])
            if checkpoints:
                tokens = _recomputed(block, tokens, *arguments)
            else:
                tokens, update = block(tokens, update, *arguments)
            if return_features and number == config.encoder_depth:
                inputs = (tokens, update) if moving_features else _values_in((tokens, update))
                features = self.projector(add_update(*inputs))
        out = self.final_layer(tokens, update, condition)
        return pairs.each(lambda out: self._unpatchify(out, rows, columns), out), features

    def _with_tangents(
        self, x: Tensor, t: Tensor, r: Tensor, y: Tensor, tangents: tuple[Tensor, Tensor]
    ) -> tuple[Pair, Pair]:
        t_x, t_t = tangents
        for name, value in (("tangents[0]", t_x), ("tangents[1]", t_t)):
            check_tensor(name, value)
        if t_x.shape[1:] != x.shape[1:] or t_t.shape != t_x.shape[:1] or len(t_x) > len(x):
            raise ValueError(
                f"tangents must have shapes [T, C, H, W] and [T] with T <= B = {len(x)} and the "
                f"rest of x, {list(x.shape)}, got {list(t_x.shape)} and {list(t_t.shape)}"
            )
        pairs.refuse_tangents("the network with tangents given", x, t, r, y)
        return Pair(x, t_x.detach()), Pair(t, t_t.detach().to(t.dtype))

    def null_condition(self, batch: int) -> Tensor:
        """`batch` null labels, [batch] int64 on the model's device, for guidance and label dropout.

        Raises:
            ValueError: a text model, whose null condition is the encoding of an empty prompt.
        """
        if self.config.num_classes is None:
            raise ValueError("a text model has no null label: encode an empty prompt and pass it")
        device = self.x_embedder.proj.weight.device
        return torch.full((batch,), self.config.num_classes, device=device)

    def _embed_times(self, t: Operand, r: Operand) -> tuple[Operand, Operand]:
        """Sum of both time embeddings, and the second alone: each [B, 1, hidden].

        `new_condition` names the times of the second one; the last has the embedder of its own.
        """
        times = {"t": t, "r": r, "t-r": pairs.subtract(t, r)}
        *others, last = self.config.new_condition.split(",")
        own = self.delta_embedder if self.config.use_new_embed else self.t_embedder
        t_embed, interval = self.t_embedder(t), own(times[last])
        for name in others:
            embedded = t_embed if name == "t" else self.t_embedder(times[name])
            interval = pairs.add(interval, embedded)
        both = pairs.add(t_embed, interval)
        return tuple(pairs.each(lambda x: x[:, None], embedding) for embedding in (both, interval))

    def _unpatchify(self, tokens: Tensor, rows: int, columns: int) -> Tensor:
        p = self.config.patch_size
        patches = tokens.reshape(tokens.shape[0], rows, columns, p, p, self.config.in_channels)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(
            tokens.shape[0], self.config.in_channels, rows * p, columns * p
        )

    def _checkpoints(self, *inputs: Operand) -> bool:
        if not self.gradient_checkpointing or not torch.is_grad_enabled():
            return False
        # Inside torch.func.jvp PyTorch cannot recompute.
        return forward_ad._current_level < 0 or not any(
            isinstance(x, Pair) or forward_ad.unpack_dual(x).tangent is not None for x in inputs
        )

    def _check(self, x: Tensor, t: Tensor, r: Tensor, y: Tensor, return_features: bool) -> None:
        for name, value in (("x", x), ("t", t), ("r", r), ("y", y)):
            check_tensor(name, value)
        config = self.config
        if x.dim() != 4 or x.shape[1] != config.in_channels:
            raise ValueError(
                f"x must have shape [B, {config.in_channels}, H, W], got {list(x.shape)}"
            )
        batch, _, height, width = x.shape
        if height % config.patch_size or width % config.patch_size or not height * width:
            raise ValueError(
                f"x must have H and W that are multiples of patch_size {config.patch_size}, "
                f"got {height} x {width}"
            )
        for name, time in (("t", t), ("r", r)):
            if time.shape != (batch,):
                raise ValueError(f"{name} must have shape [B] = [{batch}], got {list(time.shape)}")
        floats = {"x": x, "t": t, "r": r}
        if config.num_classes is None:
            floats["y"] = y
            if y.dim() != 3 or y.shape[0] != batch or y.shape[2] != config.cap_feat_dim:
                raise ValueError(
                    f"y must have shape [B, M, K] = [{batch}, M, {config.cap_feat_dim}], "
                    f"got {list(y.shape)}"
                )
        elif y.shape != (batch,):
            raise ValueError(f"y must have shape [B] = [{batch}], got {list(y.shape)}")
        elif y.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"y must hold int64 or int32 labels, got {y.dtype}")
        for name, tensor in floats.items():
            check_floating(name, tensor)
        if return_features and config.z_dim is None:
            raise ValueError(
                "return_features needs a projection head, got a config with z_dim None"
            )

    @torch.no_grad()
    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        for embedder in (self.t_embedder, self.y_embedder):
            for name, parameter in embedder.named_parameters():
                if name.endswith("weight") and parameter.dim() == 2:
                    nn.init.normal_(parameter, std=0.02)
        for layer in (*self.blocks, self.final_layer):
            nn.init.zeros_(layer.adaLN_modulation.fc2.weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def _save_pretrained(self, save_directory: Path) -> None:
        from safetensors.torch import save_file

        # One entry: safetensors writes several in random order, and equal weights as unequal files.
        metadata = {"config": json.dumps(self.config.to_dict())}
        save_file(self.state_dict(), save_directory / "model.safetensors", metadata)

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        config: TiMConfig | None = None,
        map_location: str | torch.device = "cpu",
        **download: Any,
    ) -> "TiM":
        from tim.models.loading import fetch, load_weights

        if config is None:
            raise ValueError(f"{model_id} has no config.json: load its weights with tim.load")
        folder = Path(model_id)
        file = "model.safetensors"
        path = folder / file if folder.is_dir() else fetch(model_id, file, **download)
        return load_weights(config, path, device=map_location)


def _values(operand: Operand) -> Tensor:
    return operand.primal if isinstance(operand, Pair) else operand


def _values_in(tree: Any) -> Any:
    return tree_map(_values, tree, is_leaf=lambda node: isinstance(node, Pair))


def _recomputed(block: Block, tokens: Operand, *conditions: Any) -> Operand:
    """The block with its update added inside, so that one tensor per block is stored, not two.

    Tangents are computed the first time only: the backward pass does not need them.
    """
    tangents = [tokens.tangent] if isinstance(tokens, Pair) else []
    kept: list[Tensor] = []

    def run(tokens: Tensor, *conditions: Any) -> Tensor:
        if not tangents:
            return add_update(*block(tokens, None, *_values_in(conditions)))
        out = add_update(*block(Pair(tokens, tangents.pop()), None, *conditions))
        kept.append(out.tangent)
        return out.primal

    primal = checkpoint(
        run, _values(tokens), *conditions, use_reentrant=False, preserve_rng_state=False
    )
    return Pair(primal, kept.pop()) if kept else primal
