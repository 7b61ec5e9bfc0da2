"""Features for the projection loss computed beforehand: a file for each image."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from tim.data.folder import SUFFIXES

ENDING = ".safetensors"


class FeatureFiles:
    """The files below `path`, each called like its image (`cats/1.png`: `cats/1.safetensors`).

    A file holds `features`: [2, N, K] of the image as it is and mirrored, or [N, K] where no image
    is ever mirrored (`flip` 0).

    Raises FileNotFoundError for a path that is no folder.
    """

    def __init__(self, path: str | Path, flip: float = 0.0) -> None:
        self.path, self.flip = Path(path), flip
        if not self.path.is_dir():
            raise FileNotFoundError(f"data.feature_files: {self.path} is not a folder")
        self._shape: tuple[int, ...] | None = None

    def read(self, name: str) -> Tensor:
        """Features [2, N, K] of the image `name`.

        Raises ValueError, which names the file, when it is missing, damaged or of another shape
        than the first.
        """
        image = Path(name)
        if image.suffix.lower() in (*SUFFIXES, ENDING):
            image = image.with_suffix("")
        file = self.path / image.with_name(image.name + ENDING)
        try:
            with safe_open(file, framework="pt") as opened:
                features = opened.get_tensor("features")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: {' '.join(str(error).split())}") from None
        if features.dim() == 2 and self.flip == 0:
            features = features.expand(2, -1, -1)
        shape = tuple(features.shape)
        if features.dim() != 3 or shape[0] != 2 or self._shape not in (None, shape):
            plain = ", or [N, K] with data.flip 0" * (self._shape is None)
            expected = "[2, N, K]" if self._shape is None else str(list(self._shape))
            raise ValueError(
                f"{file}: features must have shape {expected}{plain}, got {list(shape)}"
            )
        self._shape = shape
        return features
