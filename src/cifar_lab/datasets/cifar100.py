"""CIFAR-100: 50,000 and 10,000 images of 3x32x32 in a hundred (fine) classes."""

from cifar_lab.datasets.archive import loader
from cifar_lab.datasets.cifar10 import publish_pickles

load = loader("cifar100", "CIFAR100", lambda dataset: [publish_pickles(dataset, "fine_labels")])
