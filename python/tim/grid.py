"""Sample grids: one picture with a row for each number of steps."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

#: Small images are enlarged (whole factors, no smoothing) until a side has so many pixels.
MIN_SIDE = 48
GAP = 2


def image_grid(rows: Sequence[Tensor], labels: Sequence[object]) -> Image.Image:
    """Pictures rows[i], uint8 [B, H, W, C] with C = 1 or 3, as row i with labels[i] before it."""
    _, height, width, _ = rows[0].shape
    scale = max(1, -(-MIN_SIDE // min(height, width)))
    cell_h, cell_w = height * scale + GAP, width * scale + GAP
    font = ImageFont.load_default(size=max(10, min(20, cell_h // 3)))
    margin = GAP + 2 * GAP + max(round(font.getlength(str(label))) for label in labels)
    size = (margin + cell_w * max(map(len, rows)), GAP + cell_h * len(rows))
    canvas = Image.new("RGB", size, (32, 32, 32))
    draw = ImageDraw.Draw(canvas)
    for i, (row, label) in enumerate(zip(rows, labels, strict=True)):
        top = GAP + i * cell_h
        at = (margin - 2 * GAP, top + cell_h // 2)
        draw.text(at, str(label), (255, 255, 255), font, anchor="rm")
        for j, pixels in enumerate(row.numpy()):
            picture = Image.fromarray(np.repeat(pixels, 3 // pixels.shape[2], axis=2))
            resized = picture.resize((width * scale, height * scale), Image.Resampling.NEAREST)
            canvas.paste(resized, (margin + j * cell_w, top))
    return canvas


def picture_format(path: Path) -> str:
    """Pillow's name of the format that the ending of `path` stands for.

    Raises ValueError when Pillow writes no such files.
    """
    known = Image.registered_extensions()
    kind = known.get(path.suffix.lower())
    if kind not in Image.SAVE:
        raise ValueError(f"a picture's name must end in .png, .jpg or the like, got {path}")
    return kind


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write `picture` to `path`, in a folder made for it if need be, whole or not at all."""
    kind = picture_format(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        picture.save(temporary, kind)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def pixels_of(picture: Image.Image) -> Tensor:
    """uint8 [H, W, C] of a picture."""
    return torch.from_numpy(np.array(picture))
