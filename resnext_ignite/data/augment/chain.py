"""Defines short functions that augment a batch on its device, and `Augment`, which chains them.

Batches are NHWC: the three values of a pixel are adjacent, as in torch's channels_last memory format. No function uses
a random generator: the random numbers depend only on (seed, epoch, index).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from resnext_ignite.data.augment.erasing import random_boxes
from resnext_ignite.data.augment.trivial import trivial_augment
from resnext_ignite.data.images import color_to_uint8
from resnext_ignite.data.sampling import Purpose, integers, uniform

Color = tuple[float, float, float]
# ITU-R 601 luma, as in fb.resnet.torch's grayscale.
_LUMA = (0.299, 0.587, 0.114)
# Eigenvalues of the covariance of ImageNet's colours. The columns of `_COLOR_AXES` are the eigenvectors, the principal
# axes of the colours (AlexNet, section 4.1; values of fb.resnet.torch).
_COLOR_SCALES = (0.2175, 0.0188, 0.0045)
# Number of bytes of images that `normalize` processes at a time on a CPU.
_CHUNK_BYTES = 2**19
_ORDERS = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
_COLOR_AXES = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))


@functools.cache
def _constant(values: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    # Cache the tensor on the device, because each copy from the CPU to a GPU waits for the GPU.
    return torch.tensor(values, dtype=dtype, device=device)


def pad(images: Tensor, padding: int, fill: Tensor | None) -> Tensor:
    """Pad with the colour `fill`, uint8 (3,), or by reflection if `fill` is None.

    uint8 (N, H, W, 3) -> (N, H+2p, W+2p, 3), with p = `padding`.
    """
    n, h, w, _ = images.shape
    if fill is None:
        rows, columns = (_reflected(size, padding, images.device) for size in (h, w))
        return images[:, rows][:, :, columns]
    padded = fill.expand(n, h + 2 * padding, w + 2 * padding, 3).contiguous()
    padded[:, padding : padding + h, padding : padding + w] = images
    return padded


def _reflected(size: int, padding: int, device: torch.device) -> Tensor:
    positions = torch.arange(-padding, size + padding, device=device).abs()
    return torch.where(positions >= size, 2 * (size - 1) - positions, positions)


def crop(padded: Tensor, positions: Tensor, top: Tensor, left: Tensor, size: int) -> Tensor:
    """Crop a square out of each image at `positions`: (M, H, W, 3) -> (n, size, size, 3).

    `positions`, `top` and `left` are int64 (n,).
    """
    m, h, w, _ = padded.shape
    image, row, pixel = h * w * 3, w * 3, 3
    # This view contains every possible crop. Each row of a crop is 3*size contiguous values, so the gather below copies
    # whole rows.
    windows = padded.as_strided((m, h - size + 1, w - size + 1, size, size * 3), (image, row, pixel, row, 1))
    return windows[positions, top, left].view(-1, size, size, 3)


def flip(images: Tensor, chosen: Tensor) -> Tensor:
    """Mirror the chosen images left to right: uint8 (N, H, W, 3), bool (N,) -> (N, H, W, 3)."""
    flat, mirrored = images.flatten(1), images.flip(2).flatten(1)
    if flat.shape[1] % 8 == 0:
        # Select eight bytes at a time: this is possible because only whole images are selected.
        flat, mirrored = flat.view(torch.int64), mirrored.view(torch.int64)
    return torch.where(chosen[:, None], mirrored, flat).view(torch.uint8).view_as(images)


def cut_out(images: Tensor, top: Tensor, left: Tensor, height: Tensor | int, width: Tensor | int) -> Tensor:
    """Set a box in each image to zero, in place, and return `images` (N, H, W, 3).

    `top` and `left` are int64 (N,); `height` and `width` are int64 (N,) or integers. A box may extend beyond the edges
    of the image.
    """
    rows = torch.arange(images.shape[1], device=images.device)
    columns = torch.arange(images.shape[2], device=images.device)
    inside_rows = (rows >= top[:, None]) & (rows < (top + height)[:, None])
    inside_columns = (columns >= left[:, None]) & (columns < (left + width)[:, None])
    return images.masked_fill_((inside_rows[:, :, None] & inside_columns[:, None, :])[..., None], 0.0)


def normalize(images: Tensor, mean: Color, std: Color, mirrored: Tensor | None = None) -> Tensor:
    """Return (images / 255 - mean) / std: uint8 (N, H, W, 3) -> float32 (N, H, W, 3).

    Args:
        mean, std: red, green and blue, on a scale of 0 to 1.
        mirrored: bool (N,), the images to mirror in the same pass, as `flip` does; None: mirror no image.
    """
    n, h, w, _ = images.shape
    # Use rows of 3*W values: a last dimension of 3 is too short for SIMD instructions.
    shift = _constant(tuple(-m / s for m, s in zip(mean, std, strict=True)) * w, torch.float32, images.device)
    scale = _constant(tuple(1 / (255 * s) for s in std) * w, torch.float32, images.device)
    out = torch.empty(n, h, w * 3, device=images.device)
    # On a CPU, process a few images at a time: they stay in the CPU's cache between the passes, which halves the time.
    few = max(1, _CHUNK_BYTES // (h * w * 3)) if images.device.type == "cpu" else max(1, n)
    for first in range(0, n, few):
        some = slice(first, first + few)
        pictures = images[some] if mirrored is None else flip(images[some], mirrored[some])
        torch.addcmul(shift, pictures.reshape(-1, h, w * 3).float(), scale, out=out[some])
    return out.view(n, h, w, 3)


def jitter_color(images: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """Change the brightness, contrast and saturation of each image, as ColorJitter of fb.resnet.torch does.

    Brightness blends the image with black, contrast with the mean of its luma, and saturation with its luma (grey).

    Args:
        images: float (N, H, W, 3), 0 to 1.
        factors: (N, 3), the weight of the image in the blend for brightness, contrast and saturation. It may exceed 1.
        order: int64 (N,), an index into `_ORDERS`, which lists the six orders of these three operations.
    """
    orders = _constant(_ORDERS, torch.int64, images.device)
    luma = _constant(_LUMA, torch.float32, images.device)
    for turn in range(3):
        kind = orders[order, turn]
        grey = (images * luma).sum(-1, keepdim=True)
        onto = torch.where(kind[:, None, None, None] == 2, grey, grey.mean((1, 2), keepdim=True))
        onto = onto.masked_fill((kind == 0)[:, None, None, None], 0.0)
        weight = factors.gather(1, kind[:, None])[:, :, None, None]
        images = torch.lerp(onto.expand_as(images), images, weight)
    return images


def add_lighting(images: Tensor, strengths: Tensor) -> Tensor:
    """Shift each image's colour along the axes `_COLOR_AXES`, by `strengths` (N, 3) times `_COLOR_SCALES`.

    float (N, H, W, 3) -> (N, H, W, 3).
    """
    axes = _constant(_COLOR_AXES, torch.float32, images.device)
    axes = axes * _constant(_COLOR_SCALES, torch.float32, images.device)
    return images + (strengths @ axes.T)[:, None, None, :]


@dataclass(frozen=True)
class Augment:
    """Turns uint8 images into normalised images, for training (`__call__`) and evaluation (`plain`).

    Args:
        seed: the random seed.
        mean, std: normalisation of red, green and blue, on a scale of 0 to 1.
        crop_padding, crop_fill, flip, trivial, cutout, erasing, color, lighting: the values of these keys in the config
            section `augment`.
        channels_last: return images in torch's channels_last memory format.
    """

    seed: int
    mean: Color
    std: Color
    crop_padding: int = 0
    crop_fill: str = "zero"
    flip: str = "none"
    trivial: bool = False
    cutout: int = 0
    erasing: float = 0.0
    color: float = 0.0
    lighting: float = 0.0
    channels_last: bool = True

    def pad(self, pictures: Tensor) -> Tensor:
        """Pad images by p = `crop_padding` pixels on each side: uint8 (M, H, W, 3) -> (M, H+2p, W+2p, 3).

        This step is separate, so that a split in memory is padded only once, not in every batch.
        """
        return pad(pictures, self.crop_padding, self._fill(pictures.device)) if self.crop_padding else pictures

    def __call__(self, padded: Tensor, positions: Tensor | None, epoch: int, indices: Tensor) -> Tensor:
        """Augment and normalise the images at `positions`: apply `on_pixels`, then `on_images`.

        Args:
            padded: uint8 (M, H+2p, W+2p, 3), as `pad` returns them.
            positions: int64 (n,), the images to take from `padded`; None: all, in order.
            epoch: from 1.
            indices: int64 (n,), the index of each of these images in its whole split.

        Returns:
            float32 (n, 3, H, W).
        """
        if self.trivial:
            return self.on_images(self.on_pixels(padded, positions, epoch, indices), epoch, indices)
        # Mirror during the normalisation: this saves a pass over the images.
        images = self._cropped(padded, positions, epoch, indices)
        return self.on_images(images, epoch, indices, self._mirrored(epoch, indices))

    def on_pixels(self, padded: Tensor, positions: Tensor | None, epoch: int, indices: Tensor) -> Tensor:
        """Crop, mirror and apply TrivialAugment; return uint8 (n, H, W, 3). The arguments are those of `__call__`."""
        images, mirrored = self._cropped(padded, positions, epoch, indices), self._mirrored(epoch, indices)
        images = images if mirrored is None else flip(images, mirrored)
        return trivial_augment(images, self.seed, epoch, indices) if self.trivial else images

    def on_images(self, images: Tensor, epoch: int, indices: Tensor, mirrored: Tensor | None = None) -> Tensor:
        """Apply the colour operations, normalise, then cut out and erase: uint8 (n, H, W, 3) -> float32 (n, 3, H, W).

        Args:
            images: the result of `on_pixels`.
            mirrored: bool (n,), the images that must still be mirrored; None: mirror no image.
        """
        (height, width), device = images.shape[1:3], images.device
        if self.color or self.lighting:
            images = images if mirrored is None else flip(images, mirrored)
            mean, std = self._moments(device)
            out = (self._jittered(images.float() / 255, epoch, indices) - mean) / std
        else:
            out = normalize(images, self.mean, self.std, mirrored)
        if self.cutout:
            # The centre of the square is anywhere in the image, so a part of the square may lie outside (DeVries and
            # Taylor, arXiv:1708.04552, section 3.2). After normalisation, zero is the mean colour.
            half = self.cutout // 2
            top = integers(self.seed, epoch, indices, Purpose.CUTOUT_Y, height) - half
            left = integers(self.seed, epoch, indices, Purpose.CUTOUT_X, width) - half
            out = cut_out(out, top, left, self.cutout, self.cutout)
        if self.erasing:
            out = cut_out(out, *random_boxes(self.seed, epoch, indices, height, width, self.erasing))
        return self._as_nchw(out)

    def plain(self, images: Tensor) -> Tensor:
        """Normalise only: uint8 (N, H, W, 3) -> float32 (N, 3, H, W)."""
        return self._as_nchw(normalize(images, self.mean, self.std))

    def resized(self, images: Tensor, size: int) -> Tensor:
        """Resize square images with antialiasing: float32 (N, 3, H, W) -> (N, 3, size, size).

        Resizing normalised images gives the same result as resizing and then normalising, because the weights of each
        output pixel sum to one.
        """
        if images.shape[-1] == size:
            return images
        smaller = functional.interpolate(images, size=(size, size), mode="bilinear", antialias=True)
        return smaller.contiguous(memory_format=torch.channels_last if self.channels_last else torch.contiguous_format)

    def unnormalize(self, images: Tensor) -> Tensor:
        """Invert the normalisation: float (N, 3, H, W) -> uint8 (N, 3, H, W)."""
        mean, std = (moment[:, None, None] for moment in self._moments(images.device))
        return ((images.float() * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)

    def _fill(self, device: torch.device) -> Tensor | None:
        if self.crop_fill == "reflect":
            return None
        return _constant(color_to_uint8(self.mean) if self.crop_fill == "mean" else (0, 0, 0), torch.uint8, device)

    def _moments(self, device: torch.device) -> tuple[Tensor, Tensor]:
        return _constant(self.mean, torch.float32, device), _constant(self.std, torch.float32, device)

    def _cropped(self, padded: Tensor, positions: Tensor | None, epoch: int, indices: Tensor) -> Tensor:
        if not self.crop_padding:
            return padded if positions is None else padded[positions]
        offsets = 2 * self.crop_padding + 1
        top = integers(self.seed, epoch, indices, Purpose.CROP_Y, offsets)
        left = integers(self.seed, epoch, indices, Purpose.CROP_X, offsets)
        places = torch.arange(len(padded), device=padded.device) if positions is None else positions
        return crop(padded, places, top, left, padded.shape[1] - 2 * self.crop_padding)

    def _mirrored(self, epoch: int, indices: Tensor) -> Tensor | None:
        if self.flip == "random":
            return uniform(self.seed, epoch, indices, Purpose.FLIP) < 0.5
        if self.flip == "alternating":
            # A random bit per image decides whether the image is mirrored in the first epoch. After that, this changes
            # in every epoch.
            return (integers(self.seed, 0, indices, Purpose.FLIP, 2) + epoch) % 2 == 0
        return None

    def _jittered(self, images: Tensor, epoch: int, indices: Tensor) -> Tensor:
        def draw(purpose: int) -> Tensor:
            return uniform(self.seed, epoch, indices, purpose)

        if self.color:
            kinds = (Purpose.BRIGHTNESS, Purpose.CONTRAST, Purpose.SATURATION)
            factors = torch.stack([1 + self.color * (2 * draw(kind) - 1) for kind in kinds], dim=1)
            images = jitter_color(images, factors, integers(self.seed, epoch, indices, Purpose.COLOR_ORDER, 6))
        if self.lighting:
            # Box-Muller: two uniform numbers give two normal numbers.
            radii = [(-2 * torch.log(1 - draw(Purpose.LIGHTING + pair))).sqrt() for pair in (0, 1)]
            angles = [2 * math.pi * draw(Purpose.LIGHTING + 2 + pair) for pair in (0, 1)]
            normals = [radii[0] * angles[0].cos(), radii[0] * angles[0].sin(), radii[1] * angles[1].cos()]
            images = add_lighting(images, self.lighting * torch.stack(normals, dim=1))
        return images

    def _as_nchw(self, images: Tensor) -> Tensor:
        # permute does not copy, so the result (N, 3, H, W) has the channels_last memory format.
        images = images.permute(0, 3, 1, 2)
        return images if self.channels_last else images.contiguous()
