"""Images that no camera took, for calibrating image models when the user has given no photographs.

Textured discs and bars that occlude each other over 1/f noise: the "dead leaves" model of natural
images (Lee, Mumford and Huang 2001), whose statistics make networks respond much as photographs do
(Baradad 2021, "Learning to See by Looking at Noise"). Real data are better; who uses these says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from qcompiler.models.images import IMAGENET_MEAN, IMAGENET_STD


def synthetic_batches(
    count: int,
    size: int,
    seed: int,
    batch: int = 8,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Iterator[dict[str, Tensor]]:
    """Batches of normalised images, the same for the same seed.

    Args:
        count: images in all.
        size: side of an image, in pixels.
        seed: of the random generator.
        batch: images in a batch.
        mean: of the red, green and blue channel, on the scale 0 to 1.
        std: the same.

    Yields:
        `pixel_values`: float32 (batch, 3, size, size).
    """
    generator = torch.Generator().manual_seed(seed)
    centre = torch.tensor(mean)[:, None, None]
    spread = torch.tensor(std)[:, None, None]
    for start in range(0, count, batch):
        images = [_image(size, generator) for _ in range(min(batch, count - start))]
        yield {"pixel_values": torch.stack([(image - centre) / spread for image in images])}


def _image(size: int, generator: torch.Generator) -> Tensor:
    """One image with values from 0 to 1, (3, size, size)."""

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    tint = torch.randn(3, 1, 1, generator=generator)
    image = 0.45 + 0.25 * _noise(size, 1.0 + 0.6 * float(draw(1)), generator) + 0.15 * tint
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    for _ in range(int(draw(1) * 40)):
        colour, place = draw(3, 1, 1), draw(2) * size
        radius = size * (0.02 + 0.27 * float(draw(1)) ** 3)
        angle, stretch = math.pi * float(draw(1)), 1 + 3 * float(draw(1))
        along = (columns - place[1]) * math.cos(angle) + (rows - place[0]) * math.sin(angle)
        across = (rows - place[0]) * math.cos(angle) - (columns - place[1]) * math.sin(angle)
        if float(draw(1)) < 0.4:
            inside = (along.abs() < radius * stretch / 1.5) & (across.abs() < radius / 2)
        else:
            inside = (along / stretch) ** 2 + across**2 < radius**2
        shade = 0.15 * along / (radius * stretch)
        texture = colour + 0.1 * _noise(size, 1.2, generator) + shade
        image = torch.where(inside, texture, image)
    return image.clamp(0, 1)


def _noise(size: int, exponent: float, generator: torch.Generator) -> Tensor:
    """Noise with a power spectrum of 1/f^(2·exponent), channels correlated as colours are."""
    squared = torch.fft.fftfreq(size)[:, None] ** 2 + torch.fft.rfftfreq(size)[None] ** 2
    amplitude = squared.clamp(min=1 / size**2) ** (-exponent / 2)
    white = torch.randn(3, size, size, generator=generator)
    field = torch.fft.irfft2(torch.fft.rfft2(white) * amplitude, s=(size, size))
    field = (field - field.mean()) / field.std()
    mixing = 0.35 * torch.eye(3) + 0.37 * torch.ones(3, 3)
    return torch.einsum("ij,jhw->ihw", mixing, field)
