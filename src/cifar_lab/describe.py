"""Describe a dataset (counts, balance, mean and std, images) and a model (layers, shapes, cost).

    python -m cifar_lab.describe [GROUP=OPTION] [key=value] [--figure FILE] [--images I,J,...]

takes what cifar_lab.train takes, and trains nothing.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cifar_lab import cli
from cifar_lab.errors import RequestError

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from cifar_lab.config import RunConfig
    from cifar_lab.data import Splits
    from cifar_lab.datasets import ImageArrays

SHOWN_IMAGES = 4


@dataclass(frozen=True)
class Layer:
    """One module of a model that has no modules of its own, as one image goes through it.

    `shape` is its output's without the batch; `multiply_adds` counts convolutions and dense layers
    only; `note` is the size formula of a convolution.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    multiply_adds: int
    note: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m cifar_lab.describe [GROUP=OPTION] [key=value]`."""
    return cli.run(_describe, argv)


def _describe(argv: list[str]) -> int:
    import argparse

    parser = cli.Parser(
        prog="python -m cifar_lab.describe",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--figure", type=Path, help="where to draw the images (a .png)")
    parser.add_argument("--images", help="indices of the training images to draw, as 5,27")
    arguments, rest = parser.parse_known_args(argv)

    from cifar_lab.door import compose

    request = compose(rest)
    if request.shown is not None:
        print(request.shown)
        return 0
    settings = request.cells[0].config
    if len(request.cells) > 1:
        print(f"the first of {len(request.cells)} runs: {' '.join(request.cells[0].overrides)}\n")

    from cifar_lab import guards
    from cifar_lab.data import load_arrays, make_splits
    from cifar_lab.datasets.store import data_root

    classes = settings.dataset.classes
    if classes is not None:  # before the data, which may be out of reach
        print(model_text(settings, len(classes)), end="\n\n")
    arrays = load_arrays(settings.dataset, data_root())
    chosen = choose_images(arguments.images, len(arrays.train_labels), settings.seed)
    splits = make_splits(arrays, settings.dataset, settings.split, "cpu")
    if classes is None:
        print(model_text(settings, len(splits.class_names)), end="\n\n")
    print(data_text(settings, arrays, splits))
    for warning in guards.check_config(settings, test_size=len(splits.test)):
        print(f"warning: {warning}")
    path = arguments.figure or Path(settings.output_dir) / "describe" / f"{_stem(settings)}.png"
    draw_images(arrays, splits.class_names, settings, chosen, path)
    print(f"images {', '.join(map(str, chosen))} of the training set: {path}")
    return 0


# --- the dataset ---------------------------------------------------------------------------------


def data_text(settings: "RunConfig", arrays: "ImageArrays", splits: "Splits") -> str:
    """Return counts, class balance, pixel statistics, splits and steps of an epoch."""
    train, test = len(arrays.train_labels), len(arrays.test_labels)
    shape = "x".join(map(str, arrays.train_images.shape[1:]))
    lines = [
        f"dataset {settings.dataset.name}: {train:,} training and {test:,} test images "
        f"({train + test:,} in total), {shape}, {len(splits.class_names)} classes",
        "",
        *_balance(arrays, splits),
        "",
        *_statistics(settings, arrays),
        "",
        splits.checked,
        _steps(settings, splits),
    ]
    return "\n".join(lines)


def pixel_statistics(
    images: "np.ndarray[Any, np.dtype[np.uint8]]",
) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of each channel of uint8 (N, C, H, W), in [0, 1].

    Exact: sums of whole numbers, from how often each of the 256 values occurs.
    """
    import numpy as np

    values = np.arange(256) / 255
    means, stds = [], []
    for channel in range(images.shape[1]):
        counts = np.zeros(256, dtype=np.int64)
        for part in np.array_split(images[:, channel], max(1, len(images) // 5000)):
            counts += np.bincount(part.ravel(), minlength=256)
        mean = float((counts * values).sum() / counts.sum())
        variance = float((counts * (values - mean) ** 2).sum() / counts.sum())
        means.append(mean)
        stds.append(variance**0.5)
    return means, stds


def _balance(arrays: "ImageArrays", splits: "Splits") -> list[str]:
    import numpy as np

    count = len(splits.class_names)
    columns = [np.bincount(arrays.train_labels, minlength=count)]
    columns.append(np.bincount(arrays.test_labels, minlength=count))
    width = max(5, *(len(name) for name in splits.class_names))
    lines = [f"{'class':<{width}}  {'train':>8}  {'share':>7}  {'test':>8}  {'share':>7}"]
    for label, name in enumerate(splits.class_names):
        cells = "".join(
            f"  {int(column[label]):>8,}  {column[label] / max(column.sum(), 1):>7.2%}"
            for column in columns
        )
        lines.append(f"{name:<{width}}{cells}")
    return lines


def _statistics(settings: "RunConfig", arrays: "ImageArrays") -> list[str]:
    means, stds = pixel_statistics(arrays.train_images)
    mean, std = settings.dataset.mean, settings.dataset.std
    lines = ["channel  computed mean  configured   computed std  configured"]
    for channel, (m, s) in enumerate(zip(means, stds, strict=True)):
        cells = [mean[channel] if mean else None, std[channel] if std else None]
        texts = ["none" if cell is None else f"{cell:g}" for cell in cells]
        lines.append(f"{channel:>7}  {m:>13.8f}  {texts[0]:>10}  {s:>13.8f}  {texts[1]:>10}")
    return lines


def _steps(settings: "RunConfig", splits: "Splits") -> str:
    size, evaluated = settings.training.batch_size, settings.evaluation.batch_size
    parts = [f"{-(-len(splits.train) // size):,} to train (batches of {size:,})"]
    if splits.validation is not None:
        parts.append(f"{-(-len(splits.validation) // evaluated):,} to validate")
    parts.append(f"{-(-len(splits.test) // evaluated):,} to test (batches of {evaluated:,})")
    return "steps of an epoch: " + ", ".join(parts)


def choose_images(asked: str | None, size: int, seed: int) -> list[int]:
    """Return the training images to draw: those asked for, else some at random by the seed."""
    import numpy as np

    if asked is None:
        order = np.random.default_rng(seed).permutation(size)
        return [int(index) for index in order[:SHOWN_IMAGES]]
    try:
        chosen = [int(word) for word in asked.split(",")]
    except ValueError:
        raise RequestError(f"--images={asked} is wrong: it must be numbers, as 5,27") from None
    wrong = [index for index in chosen if not 0 <= index < size]
    if wrong or len(chosen) > 100:
        raise RequestError(
            f"--images={asked} is wrong: it must be at most 100 indices from 0 to {size - 1}"
        )
    return chosen


def draw_images(
    arrays: "ImageArrays",
    class_names: Sequence[str],
    settings: "RunConfig",
    chosen: Sequence[int],
    path: Path,
) -> None:
    """Draw training images, each under its class and index, into a .png (S1-02)."""
    import numpy as np

    from cifar_lab.figures import style

    if path.suffix.lower() != ".png":
        raise RequestError(f"--figure={path} is wrong: it must be the name of a .png")
    names = settings.dataset.display_names or class_names
    columns = min(len(chosen), 8)
    rows = -(-len(chosen) // columns)
    figure = style.new_figure(1.9 * columns, 2.3 * rows)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels:
        axes.axis("off")
    for axes, index in zip(panels, chosen, strict=False):
        image = np.transpose(arrays.train_images[index], (1, 2, 0))
        grey = image.shape[2] == 1
        axes.imshow(image[..., 0] if grey else image, cmap="gray" if grey else None)
        axes.set_title(f"{names[int(arrays.train_labels[index])]}\n{index}", fontsize=style.NORMAL)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, format="png")


def _stem(settings: "RunConfig") -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in settings.dataset.name)[:80]


# --- the model -----------------------------------------------------------------------------------


def model_text(settings: "RunConfig", num_classes: int) -> str:
    """Return a model's layers with output shapes, parameters and multiply-adds, and the sums."""
    from cifar_lab import components, device

    shape = settings.dataset.image_shape
    with device.seeded(settings.seed):
        model = components.build_model(settings, num_classes)
    layers = trace(model, shape)
    rows = [("layer", "kind", "output", "parameters", "multiply-adds", "")]
    rows += [
        (
            layer.name,
            layer.kind,
            "x".join(map(str, layer.shape)),
            f"{layer.parameters:,}",
            f"{layer.multiply_adds:,}",
            layer.note,
        )
        for layer in layers
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = [
        f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:<{widths[2]}}  {d:>{widths[3]}}  "
        f"{e:>{widths[4]}}  {note}".rstrip()
        for a, b, c, d, e, note in rows
    ]
    parameters = sum(p.numel() for p in model.parameters())
    fixed = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    buffers = sum(b.numel() for b in model.buffers())
    cost = sum(layer.multiply_adds for layer in layers)
    name = settings.model["_target_"].rpartition(".")[2]
    sizes = "x".join(map(str, shape))
    return "\n".join(
        [
            f"model {name} on images of {sizes}, {num_classes} classes",
            "",
            *lines,
            "",
            f"parameters: {parameters:,}"
            + (f", {fixed:,} of them fixed" if fixed else "")
            + f" (and {buffers:,} numbers that are not trained)",
            f"multiply-adds of convolutions and dense layers, per image: {cost:,}",
        ]
    )


def trace(model: "nn.Module", shape: Sequence[int]) -> list[Layer]:
    """Run a model on one image and return its layers in the order in which they ran."""
    import torch
    from torch import nn

    layers: list[Layer] = []
    names = {module: name for name, module in model.named_modules()}

    def note(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        source = inputs[0] if inputs else output
        layers.append(
            Layer(
                name=names[module] or "model",
                kind=type(module).__name__,
                shape=tuple(output.shape[1:]) if isinstance(output, torch.Tensor) else (),
                parameters=sum(p.numel() for p in module.parameters()),
                multiply_adds=multiply_adds(module, output),
                note=size_formula(module, source.shape) if isinstance(module, nn.Conv2d) else "",
            )
        )

    leaves = [m for m in model.modules() if not list(m.children())]
    hooks = [module.register_forward_hook(note) for module in leaves]
    try:
        model.eval()
        with torch.no_grad():
            model(torch.zeros(1, *shape))
    finally:
        for hook in hooks:
            hook.remove()
    return layers


def multiply_adds(module: "nn.Module", output: Any) -> int:
    """Return the multiply-adds of a convolution or a dense layer for its output; 0 for others."""
    from torch import nn

    if isinstance(module, nn.Conv2d):
        height, width = module.kernel_size
        return int(output.numel() * module.in_channels // module.groups * height * width)
    if isinstance(module, nn.Linear):
        return int(output.numel() * module.in_features)
    return 0


def size_formula(conv: "nn.Conv2d", shape: Sequence[int]) -> str:
    """Return how a convolution's output height comes about: ((32-5+2*0)/1)+1 = 28 (S3-06)."""
    size, kernel, stride = int(shape[-2]), conv.kernel_size[0], conv.stride[0]
    reach = conv.dilation[0] * (kernel - 1) + 1
    if isinstance(conv.padding, str):
        total = reach - 1 if conv.padding == "same" else 0
    else:
        total = 2 * int(conv.padding[0])
    padding = f"2*{total // 2}" if total % 2 == 0 else str(total)
    result = (size - reach + total) // stride + 1
    return f"(({size}-{reach}+{padding})/{stride})+1 = {result}"


if __name__ == "__main__":
    sys.exit(main())
