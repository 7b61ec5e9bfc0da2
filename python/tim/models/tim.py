"""The TiM network: F = F_theta(x_t, t, r, y), for class labels and captions alike."""

# No postponed annotations here: the hub mixin reads the class of `config` from the signature.

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.autograd import forward_ad

from tim.models.blocks import (
    Block,
    FinalLayer,
    Prepared,
    Tokens,
    add_update,
    can_prepare,
    norm_without_parameters,
    prepare,
)
from tim.models.config import TiMConfig
from tim.models.embeddings import CaptionEmbedder, LabelEmbedder, PatchEmbedder, TimeEmbedder
from tim.models.hub import HubMixin
from tim.models.inputs import check, checked_tangents, moving_images
from tim.models.layers import Linear, SiLU
from tim.models.packing import Layout
from tim.models.recompute import recomputed, values, values_in
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
        x: Tensor | Sequence[Tensor],
        t: Tensor,
        r: Tensor,
        y: Tensor,
        return_features: bool = False,
        tangents: tuple[Tensor | Sequence[Tensor], Tensor] | None = None,
    ) -> Any:
        """F_theta(x_t, t, r, y).

        Args:
            x: [B, C, H, W] noisy latents, H and W any multiples of patch_size; or a packed batch, a
                sequence of B latents [C, H_i, W_i] of any sizes, which run as one sequence of
                tokens without padding.
            t, r: [B] times as the network sees them, c_noise(t) and c_noise(r); best in float32
                or wider, whatever the dtype of the parameters.
            y: [B] integer labels (num_classes is the null label), or [B, M, cap_feat_dim] caption
                features. There is no text mask.
            return_features: also return the projection head's output after block `encoder_depth`.
            tangents: of x [T, C, H, W] and t [T] of the last T <= B samples: also return the
                derivative dF along them. One pass, for which `torch.func.jvp` would need another
                one for the samples without tangents; works with `gradient_checkpointing`. Of a
                packed batch T tensors like the last of x, and t [T].

        Returns:
            F: [B, C, H, W], or as a tuple F, features [B, N, z_dim] with N = (H / p) (W / p), and
            dF [T, C, H, W], without graph; in the dtype of the parameters, or that of autocast.
            x and captions are converted to it. Of a packed batch lists of F_i [C, H_i, W_i],
            features [N_i, z_dim] and dF_i.

        Raises:
            ValueError: a shape does not fit, or features are asked of a network without z_dim.
            TypeError: an argument is no tensor, x, t, r or captions are not floating-point, or
                labels not integers.
        """
        check(self.config, x, t, r, y, return_features)
        patch, dtype = self.config.patch_size, self.x_embedder.proj.weight.dtype
        if isinstance(x, Tensor):
            rows, columns = (size // patch for size in x.shape[2:])
            grids, layout = [(rows, columns)], None
        else:
            moving = moving_images(x, t, r, tangents)
            grids = [(image.shape[1] // patch, image.shape[2] // patch) for image in x]
            layout = Layout(tuple(grids), moving)

        def patches(x: Tensor | Sequence[Tensor]) -> Tensor:
            if layout is None:
                return self.x_embedder.patches(x.to(dtype))
            return layout.concatenated([self.x_embedder.patches(i[None].to(dtype))[0] for i in x])

        def latents(tokens: Tensor) -> Tensor | list[Tensor]:
            if layout is None:
                return self._unpatchify(tokens, *grids[0])
            images = layout.images(tokens)
            last = grids[len(grids) - len(images) :]
            return [
                self._unpatchify(image[None], *grid)[0]
                for image, grid in zip(images, last, strict=True)
            ]

        def of_images(rows: Tensor | None) -> Tensor | list[Tensor] | None:
            return rows if layout is None or rows is None else layout.images(rows)

        if tangents is not None:
            v, dt = checked_tangents(x, t, r, y, tangents)
            inputs = patches(x), t
            if layout is None or layout.moving:
                with torch.no_grad():
                    v = patches(v)
                inputs = Pair(inputs[0], v), Pair(t, dt)
            F, features = self._run(
                *inputs, r, y, return_features, grids, layout, moving_features=False
            )
            dF = latents(F.tangent) if isinstance(F, Pair) else []
            F, features = latents(values(F)), of_images(features)
            return (F, features, dF) if return_features else (F, dF)
        embedded = patches(x)
        duals = pairs.of_duals(
            (embedded, t, r, y) if y.is_floating_point() else (embedded, t, r), self.parameters()
        )
        inputs = (embedded, t, r, y) if duals is None else (*duals, *(y,)[len(duals) - 3 :])
        out, features = (
            None if operand is None else pairs.as_dual("the network", operand)
            for operand in self._run(*inputs, return_features, grids, layout)
        )
        out, features = latents(out), of_images(features)
        return (out, features) if return_features else out

    def _run(
        self,
        patches: Operand,
        t: Operand,
        r: Operand,
        y: Operand,
        return_features: bool,
        grids: Sequence[tuple[int, int]],
        layout: Layout | None,
        moving_features: bool = True,
    ) -> tuple[Operand, Operand | None]:
        """F token by token, and features; the latter without tangents unless `moving_features`."""
        config = self.config
        tokens: Tokens = self.x_embedder(patches)
        wide = torch.promote_types(values(tokens).dtype, torch.float32)
        if layout is not None:
            t, r, y = (layout.ordered(value) for value in (t, r, y))
            grids, tokens = [grids[i] for i in layout.order], layout.pieces(tokens)
        condition, interval = self._embed_times(t, r)
        text = None
        if config.num_classes is None:
            text = norm_without_parameters(self.y_embedder(y))
        else:
            condition = pairs.add(condition, self.y_embedder(y)[:, None])
        tables = [
            rope_tables(
                *grid, config.head_dim, config.rope_grid,
                scaling=config.rope_scaling, decouple=config.rope_decouple,
                train_size=config.rope_train_size or config.input_size // config.patch_size,
                device=values(patches).device, dtype=wide,
            )
            for grid in grids
        ]  # fmt: skip
        rope = tables[0]
        if len(tables) > 1:
            rope = tuple(torch.cat(table) for table in zip(*tables, strict=True))

        conditions = (condition, interval, text, rope)
        prepared: list[Prepared | None] = [None] * len(self.blocks)
        if can_prepare(self.blocks):
            prepared = prepare(self.blocks, condition, interval)
        checkpoints = self._checkpoints(patches, t, r)
        update, features = None, None
        for number, block in enumerate(self.blocks, start=1):
            arguments = (*conditions, prepared[number - 1], layout)
            if checkpoints:
                tokens = recomputed(block, tokens, *arguments)
            else:
                tokens, update = block(tokens, update, *arguments)
            if return_features and number == config.encoder_depth:
                inputs = (tokens, update) if moving_features else values_in((tokens, update))
                features = add_update(*inputs, layout)
                features = self.projector(features if layout is None else layout.joined(features))
        return self.final_layer(tokens, update, condition, layout), features

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
