"""The TiM network: F = F_theta(x_t, t, r, y), for class labels and captions alike."""

# No postponed annotations here: the hub mixin reads the class of `config` from the signature.

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from tim._checks import check_floating, check_tensor
from tim.models.blocks import Block, FinalLayer, add_update, norm_without_parameters
from tim.models.config import TiMConfig
from tim.models.embeddings import CaptionEmbedder, LabelEmbedder, PatchEmbedder, TimeEmbedder
from tim.models.hub import HubMixin
from tim.models.layers import Linear
from tim.models.rope import rope_tables


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
            PyTorch cannot recompute, ignore it: with it, take tangents under `torch.no_grad()`.

    Initialisation: linear layers Xavier-uniform with zero bias; embedders of t, labels and captions
    normal with std 0.02; the last layer of every modulation and of the network zero, so that each
    block starts as the identity and the network at F = 0 (adaLN-Zero, arXiv 2212.09748).
    """

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
                nn.SiLU(),
                Linear(config.projector_dim, config.projector_dim),
                nn.SiLU(),
                Linear(config.projector_dim, config.z_dim),
            )
        self.final_layer = FinalLayer(width, patch * patch * channels)
        self._initialise()

    def forward(
        self, x: Tensor, t: Tensor, r: Tensor, y: Tensor, return_features: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """F_theta(x, t, r, y).

        Args:
            x: [B, C, H, W] noisy latents, H and W any multiples of patch_size.
            t, r: [B] times as the network sees them, c_noise(t) and c_noise(r); best in float32
                or wider, whatever the dtype of the parameters.
            y: [B] integer labels (num_classes is the null label), or [B, M, cap_feat_dim] caption
                features. There is no text mask.
            return_features: also return the projection head's output after block `encoder_depth`.

        Returns:
            F: [B, C, H, W], or (F, features [B, N, z_dim]) with N = (H / p) (W / p); in the dtype
            of the parameters, or that of autocast. x and captions are converted to it.

        Raises:
            ValueError: a shape does not fit, or features are asked of a network without z_dim.
            TypeError: an argument is no tensor, x, t, r or captions are not floating-point, or
                labels not integers.
        """
        self._check(x, t, r, y, return_features)
        config = self.config
        rows, columns = (size // config.patch_size for size in x.shape[2:])
        tokens = self.x_embedder(x.to(self.x_embedder.proj.weight.dtype))
        condition, interval = self._embed_times(t, r)
        text = None
        if config.num_classes is None:
            text = norm_without_parameters(self.y_embedder(y))
        else:
            condition = condition + self.y_embedder(y)[:, None]
        rope = rope_tables(
            rows, columns, config.head_dim, config.rope_grid, device=x.device,
            dtype=torch.promote_types(tokens.dtype, torch.float32),
        )  # fmt: skip

        conditions = (condition, interval, text, rope)
        checkpoints = self._checkpoints(x, t, r)
        update, features = None, None
        for number, block in enumerate(self.blocks, start=1):
            if checkpoints:
                tokens = _recomputed(block, tokens, *conditions)
            else:
                tokens, update = block(tokens, update, *conditions)
            if return_features and number == config.encoder_depth:
                features = self.projector(add_update(tokens, update))
        out = self._unpatchify(self.final_layer(tokens, update, condition), rows, columns)
        return (out, features) if return_features else out

    def null_condition(self, batch: int) -> Tensor:
        """`batch` null labels, [batch] int64 on the model's device, for guidance and label dropout.

        Raises:
            ValueError: a text model, whose null condition is the encoding of an empty prompt.
        """
        if self.config.num_classes is None:
            raise ValueError("a text model has no null label: encode an empty prompt and pass it")
        device = self.x_embedder.proj.weight.device
        return torch.full((batch,), self.config.num_classes, device=device)

    def _embed_times(self, t: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of both time embeddings, and the second alone: each [B, 1, hidden].

        `new_condition` names the times of the second one; the last has the embedder of its own.
        """
        times = {"t": t, "r": r, "t-r": t - r}
        *others, last = self.config.new_condition.split(",")
        own = self.delta_embedder if self.config.use_new_embed else self.t_embedder
        t_embed, interval = self.t_embedder(t), own(times[last])
        for name in others:
            interval = interval + (t_embed if name == "t" else self.t_embedder(times[name]))
        return (t_embed + interval)[:, None], interval[:, None]

    def _unpatchify(self, tokens: Tensor, rows: int, columns: int) -> Tensor:
        p = self.config.patch_size
        patches = tokens.reshape(tokens.shape[0], rows, columns, p, p, self.config.in_channels)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(
            tokens.shape[0], self.config.in_channels, rows * p, columns * p
        )

    def _checkpoints(self, *inputs: Tensor) -> bool:
        if not self.gradient_checkpointing or not torch.is_grad_enabled():
            return False
        return all(forward_ad.unpack_dual(tensor).tangent is None for tensor in inputs)

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


def _recomputed(block: Block, tokens: Tensor, *conditions: Any) -> Tensor:
    """The block with its update added inside, so that one tensor per block is stored, not two."""

    def run(tokens: Tensor, *conditions: Any) -> Tensor:
        return add_update(*block(tokens, None, *conditions))

    return checkpoint(run, tokens, *conditions, use_reentrant=False, preserve_rng_state=False)
