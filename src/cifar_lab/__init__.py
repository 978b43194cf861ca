"""Image classification experiments: from a typed config to a folder of results."""

__version__ = "0.1.0"
