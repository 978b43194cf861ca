"""`cifar_lab.run` with objects: a notebook's class, arrays, a torch Dataset, keyword arguments."""

import linecache
import shutil
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch.utils.data import Dataset

import cifar_lab
from cifar_lab.errors import UsageError
from cifar_lab.objects import words_of

CELLS = (
    "import torch.nn.functional as F\nfrom torch import nn\nHIDDEN = 12",
    "def flat(x):\n    return x.flatten(1) / HIDDEN",
    """
class Net(nn.Module):
    '''Two dense layers.'''

    def __init__(self, num_classes, image_shape, depth=1):
        super().__init__()
        channels, height, width = image_shape
        self.depth = depth
        self.first = nn.Linear(channels * height * width, HIDDEN)
        self.last = nn.Linear(HIDDEN, num_classes)

    def forward(self, images):
        return self.last(F.relu(self.first(flat(images))))
""",
)
FAST: dict[str, Any] = {"epochs": 1, "figures": "none", "device": "cpu", "threads": 1}


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """What the cells of a notebook define; there is no file, but their text is known."""
    module = types.ModuleType("a_notebook")
    monkeypatch.setitem(sys.modules, "a_notebook", module)
    for number, text in enumerate(CELLS):
        name = f"<cell {number}>"
        linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
        exec(compile(text, name, "exec"), vars(module))
    yield module
    for number in range(len(CELLS)):
        del linecache.cache[f"<cell {number}>"]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    monkeypatch.setenv("CIFAR_LAB_DATA", str(tmp_path / "data"))
    digits = load_digits()
    return digits.images[:400].astype(np.float32) / 16, digits.target[:400]


def test_a_class_of_a_notebook_on_arrays_is_a_run_that_opens_elsewhere(
    notebook: Any, data: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"model": notebook.Net, "dataset": data, "output_dir": tmp_path / "out", **FAST}
    run = cifar_lab.run(**asked, lr=0.01, model__depth=2)
    assert run.status == "finished"
    assert run.config.training.epochs == 1
    assert run.config.optimizer["lr"] == 0.01
    assert run.config.model["depth"] == 2
    assert list(run.config.dataset.image_shape) == [1, 8, 8]
    assert run.path.name.startswith("npz-Net-adam-")
    assert cifar_lab.run(**asked, lr=0.01, model__depth=2).path == run.path
    module = run.config.model["_target_"].split(".")[0]
    (kept,) = run.path.glob("own_*.py")
    assert kept.stem == module
    # as in another process, on a machine without the data folder
    monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if str(tmp_path) not in place])
    shutil.rmtree(tmp_path / "data")
    model = cifar_lab.load_run(run.path, trust=module).load_model()
    assert type(model).__name__ == "Net"
    assert str(sys.modules[module].__file__) == str(kept)


def test_another_source_is_another_model_and_a_comment_is_not(notebook: Any) -> None:
    words = words_of({"model": notebook.Net})
    text = CELLS[2].replace("# a", "")
    commented = text + "\n# nothing"
    linecache.cache["<cell 2>"] = (0, None, commented.splitlines(keepends=True), "<cell 2>")
    notebook.images = torch.zeros(3)  # the name of an argument, which is another one
    assert words_of({"model": notebook.Net}) == words
    notebook.HIDDEN = 13
    assert words_of({"model": notebook.Net}) != words


def test_an_instance_is_built_again_from_what_it_keeps(notebook: Any) -> None:
    net = notebook.Net(10, (1, 8, 8), depth=3)
    assert words_of({"model": net}) == words_of({"model": notebook.Net, "model__depth": 3})


class Pairs(Dataset[tuple[torch.Tensor, int]]):
    classes = ("even", "odd")

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.full((3, 8, 8), index / 40), index % 2


def test_a_torch_dataset_is_kept_once_under_its_content(data: object, tmp_path: Path) -> None:
    words = words_of({"dataset": Pairs()})
    assert words == words_of({"dataset": Pairs()})
    assert "dataset.image_shape=[3, 8, 8]" in words
    (path,) = (tmp_path / "data" / "own").glob("*.npz")
    with np.load(path) as arrays:
        assert arrays["images"].dtype == np.uint8
        assert arrays["images"][39].max() == 249
        assert list(arrays["class_names"]) == ["even", "odd"]
    four = words_of({"dataset": (Pairs(), Pairs())})
    assert four != words


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lr": 0.1, "epochs": 3}, ["optimizer.lr=0.1", "training.epochs=3"]),
        ({"batch_size": 8, "seed": 1}, ["training.batch_size=8", "seed=1"]),
        ({"optimizer": "sgd", "learning_rate": 1}, ["optimizer=sgd", "optimizer.lr=1"]),
        ({"training__patience": None}, ["training.patience=null"]),
        ({"output_dir": Path("my runs")}, ["output_dir='my runs'"]),
        ({"deterministic": True, "model": "convnet"}, ["model=convnet", "deterministic=true"]),
        ({"lr": np.float32(0.5), "seed": np.int64(3)}, ["optimizer.lr=0.5", "seed=3"]),
        ({"lrr": 1}, ["lrr=1"]),
    ],
)
def test_keyword_arguments_are_words(settings: dict[str, Any], words: list[str]) -> None:
    assert words_of(settings) == words


def test_wrong_objects_are_one_line(notebook: Any, data: tuple[Any, Any], tmp_path: Path) -> None:
    images, labels = data
    for dataset, message in (
        ((images * 16, labels), "must be uint8 from 0 to 255, or float from 0 to 1"),
        ((images, labels, images), "dataset must be"),
        ([], "dataset must be"),
        ((images.reshape(400, 64), labels), r"the images have shape \(400, 64\); it must be"),
        (([[1], [1, 2]], [0, 1]), "dataset: all input arrays must have the same shape"),
        (([], []), "dataset: need at least one array"),
        ((torch.zeros(2, 8, 8, requires_grad=True), [0, 1]), "dataset: Can't call numpy"),
    ):
        with pytest.raises(UsageError, match=message):
            words_of({"dataset": dataset})
    with pytest.raises(UsageError, match=r"labels in .*float64.*must be whole numbers"):
        cifar_lab.run(dataset=(images, labels + 0.5), output_dir=tmp_path)
    with pytest.raises(UsageError, match=r"did you mean training\.epochs"):
        cifar_lab.run(epocs=1)
    with pytest.raises(UsageError, match="and 3 is of type int"):
        cifar_lab.run(3)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"<object object at .*> cannot be written down"):
        cifar_lab.run(lr=object())
    for value in (object(), torch.device("cpu"), {"relu": torch.nn.ReLU}):
        notebook.flat = value
        with pytest.raises(UsageError, match=r"flat is .*, which cannot be written down"):
            words_of({"model": notebook.Net})
    linecache.cache["<cell 2>"] = (0, None, [], "<cell 2>")
    with pytest.raises(UsageError, match="source of Net cannot be had"):
        words_of({"model": notebook.Net})
