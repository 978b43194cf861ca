"""The network of airbench94: whitened patches, then three groups of two 3x3 convolutions."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

_EPSILON = 5e-4  # added to the variances of the patches
_BIAS_SCALE = 8.0  # SGD moves the biases of the norms 64 times as fast as the rest
_MOMENTUM = 0.4  # how far the running statistics of a norm move to those of each batch
_FEATURE_SCALE = 1 / 9


class BiasNorm(nn.BatchNorm2d):
    """Batch norm that learns a bias and no scale, and whose running statistics follow quickly.

    The bias is 8 times its parameter: a step of SGD moves it 64 times as far, and decays it as the
    rest, which is what a learning rate 64 times as high for the biases alone does.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-12, momentum=_MOMENTUM, affine=False)
        self.shift = nn.Parameter(torch.zeros(channels))

    def forward(self, input: Tensor) -> Tensor:
        """Return (B, C, H, W), normalised per channel, plus the bias."""
        return functional.batch_norm(
            input,
            self.running_mean,
            self.running_var,
            None,
            _BIAS_SCALE * self.shift,
            self.training,
            _MOMENTUM,
            self.eps,
        )


class Whitening(nn.Conv2d):
    """A fixed 2x2 convolution to each patch's channels and their negatives: (B, 8 C, H-1, W-1).

    `bias_scale`: it has a bias, zero at first, which is so many times its parameter.
    """

    def __init__(self, channels: int, bias_scale: float | None) -> None:
        super().__init__(channels, 8 * channels, 2, bias=False)
        self.weight.requires_grad_(False)
        self._bias_scale = bias_scale or 1.0
        if bias_scale is not None:
            self.bias = nn.Parameter(torch.zeros(8 * channels))

    def forward(self, input: Tensor) -> Tensor:
        """Return the whitened patches of images (B, C, H, W)."""
        bias = None if self.bias is None else self._bias_scale * self.bias
        return functional.conv2d(input, self.weight, bias)


class Airbench(nn.Module):
    """The network of airbench94 (Jordan 2024, arXiv:2404.00498).

    A 2x2 convolution, fixed by `initialize_from_images` to whiten the patches of the training
    images, with each filter's negative; then three groups of convolution, 2x2 max pooling, norm,
    activation, convolution, norm, activation; then the maximum of each channel. Convolutions begin
    as the identity on as many channels as they can. ``images`` are (B, *image_shape), ``features``
    (B, widths[2]), the result (B, num_classes) logits. `first_bias_epochs`: the first convolution
    has a bias, zero at first, which trains for so many epochs and then stays (three in the paper);
    it is `first_bias_scale` times its parameter. There is no place for dropout. Raises ValueError
    for other than three widths, widths below 1, and images smaller than 16x16.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        num_classes: int,
        activation: Callable[[], nn.Module],
        *,
        widths: list[int],
        first_bias_epochs: int | None = None,
        first_bias_scale: float | None = None,
    ) -> None:
        super().__init__()
        if len(widths) != 3 or min(widths) < 1:
            raise ValueError("widths must be three numbers, each at least 1")
        if first_bias_epochs is not None and first_bias_epochs < 1:
            raise ValueError("first_bias_epochs must be at least 1, or null for no bias")
        if first_bias_scale is not None and first_bias_epochs is None:
            raise ValueError("first_bias_scale needs first_bias_epochs")
        if min(image_shape[1:]) < 16:
            raise ValueError("three poolings need an image of at least 16x16")
        self._bias_epochs = first_bias_epochs
        scale = None if first_bias_epochs is None else first_bias_scale or 1.0
        self.whiten = Whitening(image_shape[0], scale)
        self.groups = nn.Sequential(activation())
        channels = self.whiten.out_channels
        for number, width in enumerate(widths, start=1):
            group = nn.Sequential(
                nn.Conv2d(channels, width, 3, padding=1, bias=False),
                nn.MaxPool2d(2),
                BiasNorm(width),
                activation(),
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                BiasNorm(width),
                activation(),
            )
            for layer in group:
                if isinstance(layer, nn.Conv2d):
                    nn.init.dirac_(layer.weight.data[: layer.in_channels])
            self.groups.add_module(f"group{number}", group)
            channels = width
        self.pool = nn.AdaptiveMaxPool2d(1)
        self.classifier = nn.Linear(channels, num_classes, bias=False)

    def initialize_from_images(self, images: Tensor) -> None:
        """Set the first convolution by the patches of normalised training images (N, C, H, W)."""
        size = self.whiten.weight[0].numel()
        covariance = torch.zeros(size, size, dtype=torch.float64)
        count = 0
        for part in torch.split(images, 500):
            patches = functional.unfold(part, 2).transpose(1, 2).reshape(-1, size)
            covariance += (patches.T @ patches).double()
            count += len(patches)
        variances, directions = torch.linalg.eigh(covariance / count)
        filters = (directions / (variances + _EPSILON).sqrt()).T.flip(0)
        both = torch.cat([filters, -filters]).view_as(self.whiten.weight)
        with torch.no_grad():
            self.whiten.weight.copy_(both)

    def begin_epoch(self, epoch: int) -> None:
        """Train the first convolution's bias in the first epochs only; the first epoch is 1."""
        bias, epochs = self.whiten.bias, self._bias_epochs
        if bias is not None and epochs is not None and epoch > epochs:
            bias.requires_grad_(False)

    def features(self, images: Tensor) -> Tensor:
        """Return the largest value of each channel of the last group, over 9: (B, widths[2])."""
        return torch.flatten(self.pool(self.groups(self.whiten(images))), 1) * _FEATURE_SCALE

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, num_classes)."""
        logits: Tensor = self.classifier(self.features(images))
        return logits
