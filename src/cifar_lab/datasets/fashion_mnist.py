"""FashionMNIST: 60,000 and 10,000 pictures of clothes of 1x28x28 in ten classes."""

from cifar_lab.datasets.archive import loader
from cifar_lab.datasets.mnist import publish_idx

load = loader("fashion_mnist", "FashionMNIST", lambda dataset: [publish_idx(dataset)])
