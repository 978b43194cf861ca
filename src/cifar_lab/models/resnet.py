"""A residual network for small images: a 3x3 first convolution and no first pooling."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """activation(x + bn(conv(dropout(activation(bn(conv(x))))))), x projected where shapes differ.

    The dropout between the convolutions is Wide ResNet's (Zagoruyko and Komodakis 2016).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        activation: Callable[[], nn.Module],
        dropout: float,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.activation1 = activation()
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.activation2 = activation()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, images: Tensor) -> Tensor:
        """Return (B, out_channels, H / stride, W / stride) of (B, in_channels, H, W)."""
        inner = self.dropout(self.activation1(self.bn1(self.conv1(images))))
        output: Tensor = self.activation2(self.bn2(self.conv2(inner)) + self.shortcut(images))
        return output


class ResNet(nn.Module):
    """Stages of residual blocks, each after the first at half the size (He et al. 2015).

    Stage s has ``blocks[s]`` blocks of ``width * 2**s`` channels; ``conv_dropout`` stands inside
    the blocks, ``dense_dropout`` before the last layer. ``images`` are (B, *image_shape),
    ``features`` the average of each channel (B, width * 2**(S - 1)), the result (B, num_classes)
    logits. Raises ValueError for sizes below 1.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        num_classes: int,
        activation: Callable[[], nn.Module],
        conv_dropout: float,
        dense_dropout: float,
        *,
        width: int,
        blocks: list[int],
    ) -> None:
        super().__init__()
        if not blocks or min(*blocks, width) < 1:
            raise ValueError("blocks needs an entry; blocks and width must be at least 1")
        self.stem = nn.Sequential(
            nn.Conv2d(image_shape[0], width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            activation(),
        )
        self.stages = nn.Sequential()
        channels = width
        for stage, count in enumerate(blocks):
            out_channels = width * 2**stage
            for number in range(count):
                stride = 2 if stage > 0 and number == 0 else 1
                block = ResidualBlock(channels, out_channels, stride, activation, conv_dropout)
                self.stages.add_module(f"stage{stage + 1}_block{number + 1}", block)
                channels = out_channels
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential()
        self.classifier.add_module("dropout", nn.Dropout(dense_dropout))
        self.classifier.add_module("fc", nn.Linear(channels, num_classes))

    def features(self, images: Tensor) -> Tensor:
        """Return the flattened output of the convolutions, what the classifier sees."""
        return torch.flatten(self.pool(self.stages(self.stem(images))), 1)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, num_classes)."""
        logits: Tensor = self.classifier(self.features(images))
        return logits
