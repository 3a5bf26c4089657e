"""Image files to normalised tensors, the way ImageNet classifiers are evaluated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qcompiler.errors import InputError
from qcompiler.models.packages import optional

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def read_image(path: str) -> Any:
    """A file as a PIL image in RGB.

    Raises:
        InputError: not a readable image, or Pillow is not installed.
    """
    image_module = optional("PIL.Image", "zoo", "reading images")
    try:
        with image_module.open(path) as file:
            return file.convert("RGB")
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: not a readable image ({error}); remove it or save it again as PNG"
        ) from error


def centre_crops(
    paths: Sequence[str],
    crop: int,
    short_side: int = 256,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Tensor:
    """Read images, resize the short side where it differs, crop the centre, normalise.

    Args:
        paths: image files.
        crop: side of the square that is kept, in pixels.
        short_side: length of the short side after the resize (bicubic), in pixels.
        mean: of the red, green and blue channel, on the scale 0 to 1.
        std: the same.

    Returns:
        float32, (images, 3, crop, crop).
    """
    return torch.stack([_centre_crop(path, crop, short_side, mean, std) for path in paths])


def _centre_crop(
    path: str, crop: int, short_side: int, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    image_module = optional("PIL.Image", "zoo", "reading images")
    image = read_image(path)
    width, height = image.size
    if min(width, height) != short_side:
        scale = short_side / min(width, height)
        image = image.resize((round(width * scale), round(height * scale)), image_module.BICUBIC)
    left, top = (image.size[0] - crop) // 2, (image.size[1] - crop) // 2
    pixels = np.asarray(image.crop((left, top, left + crop, top + crop)), dtype=np.float32) / 255.0
    normalised = (pixels - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    return torch.from_numpy(np.ascontiguousarray(normalised.transpose(2, 0, 1)))
