"""Defines the grammar of model names, and computes layer sizes from a name. This module does not import torch.

Three layouts share one bottleneck block (ResNeXt, arXiv:1611.05431, figure 3c): the CIFAR layout of section 5.4
(three stages on 32x32, a 3x3 stem), the ImageNet layout of table 1 (four stages, a 7x7 stem and a max pooling), and
`cifar4`: the 3x3 stem of the CIFAR layout with the four stages of the ImageNet layout, a common choice for CIFAR.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_NAME = re.compile(
    r"(?:(?P<layout>cifar4?)_)?resnext(?P<depth>\d+)_(?P<cardinality>\d+)x(?P<base_width>\d+)d", re.ASCII
)
_IMAGENET_BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
EXPANSION = 4
"""Ratio of a block's output channels to the planes of its stage (section 4 of the paper)."""
_MAX_DIGITS = 4


@dataclass(frozen=True)
class Architecture:
    """The parts of a model name: layout, depth, cardinality (groups) and base width (channels per group in stage 1)."""

    layout: str
    depth: int
    cardinality: int
    base_width: int

    @property
    def blocks(self) -> tuple[int, ...]:
        """Return the number of blocks in each stage."""
        if self.layout == "cifar":
            return ((self.depth - 2) // 9,) * 3
        return _IMAGENET_BLOCKS[self.depth]

    @property
    def grouped_shapes(self) -> int:
        """Return the number of different shapes of the grouped 3x3 convolutions.

        Stage 1 has one shape. A later stage has two shapes, because its first block has a stride of 2, or one shape if
        the stage has a single block.
        """
        return 1 + sum(min(count, 2) for count in self.blocks[1:])

    def planes(self, stem_channels: int) -> tuple[int, ...]:
        """Return the number of planes of each stage. It doubles from stage to stage.

        The output of a stage has `EXPANSION` * planes channels.
        """
        return tuple(stem_channels * 2**stage for stage in range(len(self.blocks)))

    def group_width(self, planes: int) -> int:
        """Return the number of channels per group in a stage with `planes` planes.

        It is proportional to `planes`, and equals `base_width` at 64 planes.
        """
        return planes * self.base_width // 64


def parse_model_name(name: str) -> Architecture:
    """Parse a model name, such as `cifar_resnext29_8x64d` or `resnext50_32x4d`.

    Raises:
        ValueError: the name does not follow the grammar.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(
            f"'{name}' is not a model name: write cifar_resnext<9n+2>_<C>x<W>d (cifar_resnext29_8x64d) "
            "or resnext50|101|152_<C>x<W>d (resnext50_32x4d), with a 3x3 stem: cifar4_resnext50_32x4d"
        )
    numbers = match["depth"], match["cardinality"], match["base_width"]
    if any(len(number) > _MAX_DIGITS or number.startswith("0") for number in numbers):
        raise ValueError(f"'{name}': depth, cardinality and base width are numbers from 1 to 9999")
    depth, cardinality, base_width = map(int, numbers)
    if match["layout"] == "cifar" and (depth < 11 or (depth - 2) % 9):
        raise ValueError(f"'{name}': a CIFAR layout has a depth of 9n+2 (11, 20, 29, ...), not {depth}")
    if match["layout"] != "cifar" and depth not in _IMAGENET_BLOCKS:
        raise ValueError(f"'{name}': a layout of four stages has a depth of 50, 101 or 152, not {depth}")
    return Architecture(match["layout"] or "imagenet", depth, cardinality, base_width)


def depth_of(layout: str, blocks: tuple[int, ...]) -> int | None:
    """Return the depth of a network with this layout and these numbers of blocks per stage; None if no depth fits."""
    if layout == "cifar":
        return 9 * blocks[0] + 2 if len(blocks) == 3 and len(set(blocks)) == 1 else None
    return next((depth for depth, found in _IMAGENET_BLOCKS.items() if found == blocks), None)
