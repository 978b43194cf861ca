"""Classify pictures of any size with a past run: a table of the most probable classes."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cifar_lab import cli
from cifar_lab.errors import RequestError

if TYPE_CHECKING:
    import numpy as np

    from cifar_lab.run_dir import RunDir


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m cifar_lab.predict RUN_DIR IMAGE...`."""
    return cli.run(_predict, argv)


def _predict(argv: list[str]) -> int:
    parser = cli.Parser(prog="python -m cifar_lab.predict", description=__doc__)
    parser.add_argument("run_dir", help="a run folder")
    parser.add_argument("image", nargs="+", help="a picture (JPEG, PNG, ...)")
    parser.add_argument("--top", type=int, default=3, metavar="K", help="classes shown (3)")
    parser.add_argument("--weights", choices=("best", "last"), help="default: as the run scored")
    parser.add_argument("--device", default=None, help="auto, cuda, cuda:N, mps or cpu")
    parser.add_argument(
        "--trust", default=[], action="append", help="a module of your own that the run names"
    )
    arguments = parser.parse_args(argv)
    if arguments.top < 1:
        raise RequestError(f"--top={arguments.top} is wrong: it must be at least 1")

    from cifar_lab import components
    from cifar_lab.run_dir import RunDir

    components.trust(arguments.trust)
    run = RunDir(arguments.run_dir)
    paths = [Path(image) for image in arguments.image]
    names = class_names(run)
    rows = probabilities(run, paths, weights=arguments.weights, on=arguments.device)
    print(table(paths, rows, names, arguments.top))
    return 0


def class_names(run: "RunDir") -> list[str]:
    """Return the classes in the order of the logits, as the run's reports name them."""
    dataset = run.config.dataset
    names = dataset.display_names or dataset.classes
    if names is None:  # one's own pictures: known since they were evaluated
        names = list(run.read_summary().per_class_accuracy)
    if not names:
        raise RequestError(
            f"{run.path} does not say yet which classes it knows; finish it first: "
            f"python -m cifar_lab.train {run.path}"
        )
    return list(names)


def probabilities(
    run: "RunDir", paths: Sequence[Path], *, weights: str | None = None, on: str | None = None
) -> "np.ndarray[tuple[int, ...], np.dtype[np.float64]]":
    """Return the probability of each class for each picture, (N, C).

    Pictures are turned as their camera says, scaled until they cover the model's image size, cut
    around their middle, brought to its channels and normalised as in training. RequestError names
    the first picture that cannot be read, before a model is built.
    """
    import numpy as np
    import torch

    from cifar_lab import components, device
    from cifar_lab.building import normalisation
    from cifar_lab.datasets.image_folder import read_picture
    from cifar_lab.evaluation import load_weights
    from cifar_lab.guards import sum_to_one
    from cifar_lab.training import mean_logits

    settings = run.config
    shape = settings.dataset.image_shape
    pixels = [torch.from_numpy(np.array(read_picture(path, shape))) for path in paths]
    scored = weights or settings.evaluation.scored_weights
    if weights is None and not run.best.exists():
        scored = "last"
    where, _ = device.select_device(on or settings.device)
    with device.seeded(settings.seed):
        model = components.build_model(settings, len(class_names(run)))
    model.load_state_dict(load_weights(run, scored))
    layout = device.memory_format(where)
    model = model.to(where, memory_format=layout).eval()
    rows = []
    with torch.inference_mode():
        for picture in pixels:
            images = normalisation(settings)(picture[None].to(where), layout)
            logits = mean_logits(model, images, settings.evaluation.views).double().cpu()
            rows.append(logits if sum_to_one(logits) else logits.softmax(dim=1))
    return torch.cat(rows).numpy()


def table(
    paths: Sequence[Path],
    rows: "np.ndarray[tuple[int, ...], np.dtype[np.float64]]",
    names: Sequence[str],
    top: int,
) -> str:
    """Return a line for each picture and each of its `top` most probable classes."""
    lines = [("picture", "class", "probability")]
    for path, row in zip(paths, rows, strict=True):
        for rank, label in enumerate((-row).argsort(kind="stable")[:top]):
            lines.append(
                ("" if rank else str(path), names[int(label)], f"{100 * row[label]:.2f} %")
            )
    first, second, third = (max(len(line[i]) for line in lines) for i in range(3))
    return "\n".join(f"{a:<{first}}  {b:<{second}}  {c:>{third}}" for a, b, c in lines)


if __name__ == "__main__":
    sys.exit(main())
