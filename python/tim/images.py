"""A batch of images: one tensor [B, C, H, W], or a list of B tensors [C, H_i, W_i].

Packed batches, the lists, have images of different sizes. What the objective and the sampler
compute image by image is written once, for both, with the functions below.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from tim._checks import check_floating, check_tensor

#: [B, C, H, W], or B of [C, H_i, W_i].
Images: TypeAlias = Tensor | Sequence[Tensor]


def is_packed(images: Images) -> bool:
    return isinstance(images, (list, tuple))


def each(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function` of batches: of tensors at once, of lists image by image as batches of one.

    Arguments are images, tensors [B, ...] with a row for each image, or None. Of lists, the tensors
    that `function` returns (one or a tuple) come back as lists of what it made of each image.
    """
    packed = next((argument for argument in arguments if is_packed(argument)), None)
    if packed is None:
        return function(*arguments)
    results = []
    for i in range(len(packed)):
        results.append(function(*(_one(argument, i) for argument in arguments)))
    if isinstance(results[0], tuple):
        return tuple([out[0] for out in outputs] for outputs in zip(*results, strict=True))
    return [result[0] for result in results]


def _one(argument: Any, i: int) -> Tensor | None:
    if argument is None:
        return None
    return argument[i][None] if is_packed(argument) else argument[i : i + 1]


def joined(*batches: Images) -> Images:
    """The images of all batches in one."""
    if is_packed(batches[0]):
        return [image for batch in batches for image in batch]
    return torch.cat(batches)


def halves(batch: Images) -> tuple[Images, Images]:
    middle = len(batch) // 2
    return batch[:middle], batch[middle:]


def first(images: Images) -> Tensor:
    """A tensor with the dtype and device of the images."""
    return images[0] if is_packed(images) else images


def positions(images: Images) -> list[int] | int:
    """Height times width: one number, or one for each image of a packed batch."""
    if is_packed(images):
        return [image.shape[1] * image.shape[2] for image in images]
    return images.shape[2] * images.shape[3]


def noise_like(images: Images) -> Images:
    """N(0, 1), drawn in the order of the elements from the global generator of the device."""
    # Not randn_like, which draws in the order of the strides.
    return each(lambda x: torch.randn(x.shape, dtype=x.dtype, device=x.device), images)


def check(name: str, images: object) -> None:
    """TypeError or ValueError unless these are images of one dtype on one device."""
    if not is_packed(images):
        check_tensor(name, images)
        if images.dim() != 4 or len(images) == 0:
            raise ValueError(
                f"{name} must have shape [B, C, H, W] with B > 0, got {list(images.shape)}"
            )
        check_floating(name, images)
        return
    if not images:
        raise ValueError(f"{name} must hold at least one image, got an empty sequence")
    for i, image in enumerate(images):
        check_tensor(f"{name}[{i}]", image)
        check_floating(f"{name}[{i}]", image)
        like = images[0]
        if image.dim() != 3 or image.shape[0] != like.shape[0]:
            raise ValueError(
                f"{name}[{i}] must have shape [C, H, W] with the C of all images, "
                f"got {list(image.shape)}"
            )
        if (image.dtype, image.device) != (like.dtype, like.device):
            raise ValueError(
                f"{name}[{i}] must be {like.dtype} on {like.device} like {name}[0], "
                f"got {image.dtype} on {image.device}"
            )


def shapes(images: Images) -> list:
    if is_packed(images):
        return [list(image.shape) for image in images]
    return list(images.shape)
