"""The plain convolutional network of three reports, told apart by its options (S0, S1, S2)."""

from collections.abc import Callable, Sequence
from typing import Literal

from torch import Tensor, nn


class ConvNet(nn.Module):
    """Groups of two convolutions and a 2x2 max pooling, then two dense layers.

    Each convolution is followed by batch norm (an option) and the activation, each pooling by
    dropout; the hidden dense layer by batch norm, the activation and dropout.

    It is the network of the reports S0, S1 and S2. ``images`` are (B, *image_shape), ``features``
    (B, last width * height * width of the last pooling), the result (B, num_classes) logits.
    Raises ValueError for sizes below 1 and where a kernel or a pooling is larger than the image
    that reaches it.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        num_classes: int,
        activation: Callable[[], nn.Module],
        conv_dropout: float,
        dense_dropout: float,
        *,
        widths: list[int],
        kernel_size: int,
        padding: Literal["same", "valid"],
        batch_norm: bool,
        hidden: int,
    ) -> None:
        super().__init__()
        if min(*widths, kernel_size, hidden) < 1:
            raise ValueError("widths, kernel_size and hidden must be at least 1")
        channels, height, width = image_shape
        number = 0
        # Modules are named as in the reports, so that an option switched off renames no other.
        self.features = nn.Sequential()
        for group, out_channels in enumerate(widths, start=1):
            for _ in range(2):
                number += 1
                if kernel_size > min(height, width) and (padding == "valid" or number == 1):
                    raise ValueError(
                        f"a {kernel_size}x{kernel_size} kernel does not fit the {height}x{width} "
                        f"image that reaches convolution {number}"
                    )
                conv = nn.Conv2d(channels, out_channels, kernel_size, padding=padding)
                self.features.add_module(f"conv{number}", conv)
                if batch_norm:
                    self.features.add_module(f"bn{number}", nn.BatchNorm2d(out_channels))
                self.features.add_module(f"activation{number}", activation())
                channels = out_channels
                if padding == "valid":
                    height, width = height - kernel_size + 1, width - kernel_size + 1
            if min(height, width) < 2:
                raise ValueError(
                    f"a 2x2 pooling kernel does not fit the {height}x{width} image "
                    f"that reaches pooling {group} of {len(widths)}"
                )
            height, width = height // 2, width // 2
            self.features.add_module(f"pool{group}", nn.MaxPool2d(2))
            self.features.add_module(f"dropout{group}", nn.Dropout(conv_dropout))
        self.features.add_module("flatten", nn.Flatten())

        self.classifier = nn.Sequential()
        self.classifier.add_module("fc1", nn.Linear(channels * height * width, hidden))
        if batch_norm:
            self.classifier.add_module(f"bn{number + 1}", nn.BatchNorm1d(hidden))
        self.classifier.add_module(f"activation{number + 1}", activation())
        self.classifier.add_module(f"dropout{len(widths) + 1}", nn.Dropout(dense_dropout))
        self.classifier.add_module("fc2", nn.Linear(hidden, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, num_classes)."""
        logits: Tensor = self.classifier(self.features(images))
        return logits
