"""What the gates of two_branch and mixed_kernel do to their outputs, by the names in the YAML."""

from collections.abc import Callable
from functools import partial

from torch import nn

GATES: dict[str, Callable[[], nn.Module]] = {
    "identity": nn.Identity,
    "relu": nn.ReLU,
    "sigmoid": nn.Sigmoid,
    "softmax": partial(nn.Softmax, dim=1),
}
