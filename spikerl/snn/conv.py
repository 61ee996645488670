"""Convolutions as linear layers: the same matrix at every place of an image.

Shape legend   B batch, P positions, C channels, F filters, I inputs, N outputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn

from spikerl.errors import BadRequest
from spikerl.snn.linear import Linear

MOST = 16  # bound on the number of layers and on a kernel's side in pixels


def positions(size: tuple[int, int], kernel: int, stride: int) -> tuple[int, int]:
    """Height and width of the output of a convolution without padding."""
    height, width = size
    return (height - kernel) // stride + 1, (width - kernel) // stride + 1


@dataclass(kw_only=True)
class ConvConfig:
    """Keys of `actor` for image observations; lists but `image` have one entry for each layer."""

    image: list[int]  # height and width of an observation, whose other entries are channels
    channels_first: bool  # observations are (C, height, width); else (height, width, C)
    filters: list[int]
    kernel_sizes: list[int]  # side of each square kernel
    strides: list[int]
    pixel_max: float = 1.0  # observations are divided by this

    def check(self) -> None:
        sizes = {"image": self.image, "filters": self.filters, "kernel_sizes": self.kernel_sizes}
        for key, given in (sizes | {"strides": self.strides}).items():
            count = 2 if key == "image" else len(self.filters)
            most = MOST if key == "kernel_sizes" else 1 << 16
            if not 1 <= len(given) == count <= MOST or not all(1 <= n <= most for n in given):
                remedy = "give height and width" if key == "image" else "give one for each layer"
                raise BadRequest(f"actor.{key}", given, f"{remedy}, 1 to {most}")
        if not 1e-6 <= self.pixel_max <= 1e6:
            raise BadRequest(
                "actor.pixel_max", self.pixel_max, "give 1 or 255, or what else pixels are at most"
            )
        height, width = self.image
        for kernel, stride in zip(self.kernel_sizes, self.strides, strict=True):
            if kernel > min(height, width):
                remedy = f"a layer sees {height} x {width} positions; give smaller ones"
                raise BadRequest("actor.kernel_sizes", self.kernel_sizes, remedy)
            height, width = positions((height, width), kernel, stride)

    @property
    def pixels(self) -> int:
        return math.prod(self.image)

    def layers(self, inputs: int) -> list[Linear]:
        """The convolutions for observations of `inputs` entries; BadRequest if the image's size
        does not divide that number.
        """
        channels, rest = divmod(inputs, self.pixels)
        if rest:
            height, width = self.image
            remedy = f"{inputs} inputs are not images of {height} x {width}; give height and width"
            raise BadRequest("actor.image", self.image, remedy)
        size, first, layers = (self.image[0], self.image[1]), self.channels_first, list[Linear]()
        scale = 1.0 / self.pixel_max
        for filters, kernel, stride in zip(
            self.filters, self.kernel_sizes, self.strides, strict=True
        ):
            layers.append(
                Conv(channels, filters, size, kernel, stride, channels_first=first, scale=scale)
            )
            size = positions(size, kernel, stride)
            channels, first, scale = filters, False, 1.0
        return layers


class Conv(Linear):
    """Cuts x times `scale` into patches of kernel x kernel positions, each of which W maps from
    (C kernel kernel) to F.

    The output is again an image, flat as (height, width, F). No padding, as in DQN's networks.
    """

    def __init__(
        self,
        channels: int,
        filters: int,
        size: tuple[int, int],
        kernel: int,
        stride: int,
        *,
        channels_first: bool = False,
        scale: float = 1.0,
    ) -> None:
        super().__init__(channels * kernel * kernel, filters)
        self.channels, self.filters, self.size = channels, filters, size
        self.channels_first = channels_first
        self.kernel, self.stride, self.scale = kernel, stride, scale
        self.outputs = math.prod(positions(size, kernel, stride)) * filters

    def rows(self, x_BI: Tensor) -> Tensor:
        """The scaled patches that W multiplies, (B P, C kernel kernel)."""
        return self.patches(x_BI * self.scale if self.scale != 1.0 else x_BI)

    def patches(self, x_BI: Tensor) -> Tensor:
        """The patches of an image, (B P, C kernel kernel)."""
        if self.channels_first:
            x = x_BI.unflatten(1, (self.channels, *self.size))
        else:
            x = x_BI.unflatten(1, (*self.size, self.channels)).permute(0, 3, 1, 2)
        patches_BIP = nn.functional.unfold(x, self.kernel, stride=self.stride)
        return patches_BIP.transpose(1, 2).flatten(0, 1)

    def forward(self, x_BI: Tensor) -> Tensor:
        return super().forward(self.rows(x_BI)).view(len(x_BI), self.outputs)
