"""The functions of `import cifar_lab`: the same runs as the commands, and errors as exceptions."""

import contextlib
import linecache
import logging
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from sklearn.datasets import load_digits
from tiny_runs import TINY, at_yield, every_step
from torch import nn
from torch.utils.data import Dataset

import cifar_lab
from cifar_lab import train as command
from cifar_lab.errors import UsageError
from cifar_lab.objects import words_of
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.training import build


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> cifar_lab.Run:
    return cifar_lab.run(*TINY, f"output_dir={tmp_path_factory.mktemp('outputs')}")


def test_a_run_shows_what_its_folder_holds(run: cifar_lab.Run) -> None:
    assert run.status == run.summary.status == "finished"
    assert run.config == cifar_lab.compose(*TINY, f"output_dir={run.config.output_dir}")
    header, *rows = (run.path / "metrics.csv").read_text().splitlines()
    assert list(run.metrics) == header.split(",")
    assert [len(column) for column in run.metrics.values()] == [2] * len(run.metrics)
    assert run.metrics["epoch"] == [1, 2]
    column = header.split(",").index("val_accuracy")
    assert run.metrics["val_accuracy"] == [float(row.split(",")[column]) for row in rows]
    assert repr(run).startswith(f"<Run {run.path.name}: finished, 2 epochs, best validation")


def test_the_model_scores_as_the_run_did(run: cifar_lab.Run) -> None:
    splits = build.load_splits(run.config, "cpu")
    images = splits.test.images[splits.test.indices]
    stored = np.load(run.path / "predictions.npz")["logits"]
    expected = torch.from_numpy(stored).double().softmax(dim=1).numpy()
    assert run.predict(images[:, 0].numpy(), device="cpu") == pytest.approx(expected, abs=1e-4)
    model = run.load_model()
    assert not model.training
    assert next(model.parameters()).device.type == "cpu"


def test_a_finished_run_is_found_by_its_words_and_its_folder(run: cifar_lab.Run) -> None:
    before = (run.path / "summary.json").stat().st_mtime_ns
    assert cifar_lab.run(*TINY, f"output_dir={run.config.output_dir}") == run
    assert cifar_lab.load_run(run.path) == run
    assert cifar_lab.load_runs(run.config.output_dir) == [run]
    assert (run.path / "summary.json").stat().st_mtime_ns == before


def test_runs_in_one_process_do_not_change_each_other(run: cifar_lab.Run, tmp_path: Path) -> None:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(2)
    try:
        words = ["deterministic=true", "training.epochs=0", f"output_dir={tmp_path}/a"]
        other = cifar_lab.run(*TINY, *words)
        assert other.summary.threads == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.equal(torch.get_rng_state(), state)
    again = cifar_lab.run(*TINY, f"output_dir={tmp_path}/b")
    assert again.metrics["train_loss"] == run.metrics["train_loss"]


@pytest.mark.parametrize("words", [("optimizer.lrr=1",), ("nowhere",), ("--nonsense",)])
def test_a_wrong_request_raises_the_line_of_the_command(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(words) == 2
    line = capsys.readouterr().err.removeprefix("cifar_lab: ").rstrip("\n")
    for function in (cifar_lab.run, cifar_lab.compose):
        with pytest.raises(cifar_lab.UsageError, match=f"^{re.escape(line)}$"):
            function(*words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("-m", "seed=0,1"), "cifar_lab.run is for one run, and these are 2; use cifar_lab.sweep"),
        (("plan=true",), "plan=true is for the command line"),
        (("--cfg", "job"), "--cfg is for the command line"),
        (("--help",), "--help is for the command line"),
    ],
)
def test_what_is_for_the_command_line_or_a_sweep_is_refused(
    words: tuple[str, ...], message: str
) -> None:
    with pytest.raises(cifar_lab.UsageError, match=re.escape(message)):
        cifar_lab.run(*TINY, *words)


LAB: Any = cifar_lab
WRONG: dict[str, tuple[Callable[[Any, Any], object], str]] = {
    "no picture": (lambda run, _: run.predict(None), "pictures of type NoneType are none"),
    "no device": (lambda run, _: run.load_model(device=None), "device=None is wrong"),
    "no runs": (lambda *_: LAB.Runs().predict([]), "two runs or more"),
    "no run": (lambda *_: LAB.Run(3), "3 is wrong: it must be a path"),
    "no folder": (lambda *_: LAB.load_run(None), "None is wrong: it must be a path"),
    "folders": (lambda run, _: LAB.load_runs([run.path]), "it must be a path"),
    "no run folder": (lambda run, _: LAB.load_run(run.path.parent), "not a run folder"),
    "no metric": (lambda _, runs: runs.summarize(metric=3), "3"),
    "no words": (lambda _, runs: runs.compare(1, None), "1 is wrong: it must be KEY=VALUE"),
    "no figure": (lambda _, runs: runs.summarize().figure("x"), "there are grid, curves"),
    "empty": (lambda *_: LAB.Runs().summarize(), "no runs to compare"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_picture_run_or_folder_is_one_line(name: str, run: cifar_lab.Run) -> None:
    call, message = WRONG[name]
    with pytest.raises(cifar_lab.UsageError, match=message):
        call(run, cifar_lab.load_runs(run.path))


def test_a_run_is_found_after_the_working_directory_has_changed(
    run: cifar_lab.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.path.parent)
    relative = cifar_lab.load_run(run.path.name)
    monkeypatch.chdir(tmp_path)
    assert relative == run == cifar_lab.Run(str(run.path))
    assert relative.status == "finished"


def test_a_notebook_shows_runs(run: cifar_lab.Run) -> None:
    assert run._repr_html_().startswith(f"<b>{run.path.name}</b>: finished, ")
    runs = cifar_lab.load_runs(run.path)
    assert f"<td>{run.path.name}</td>" in runs._repr_html_()
    assert runs.summarize().figure("curves", width=3.3).get_size_inches()[0] == pytest.approx(3.3)
    assert list(run.figures) == [name for name, figure in run.config.figures.items() if figure]


def test_a_kernel_interrupt_saves_and_the_same_call_goes_on(
    run: cifar_lab.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*TINY, f"output_dir={tmp_path}"]
    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        every_step(patch)
        at_yield(patch, 4, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt, match="saved"):
            cifar_lab.run(*words)
    assert signal.getsignal(signal.SIGINT) is before
    (stopped,) = cifar_lab.load_runs(tmp_path)
    assert stopped.status == "interrupted"
    assert cifar_lab.run(*words).metrics["train_loss"] == run.metrics["train_loss"]


@pytest.mark.slow
def test_a_sweep_returns_its_runs_in_order_and_needs_no_main_guard(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    words = [*TINY, "seed=0,1", "jobs=2", f"output_dir={tmp_path / 'outputs'}"]
    script.write_text(
        "import cifar_lab\n"
        "print('started')\n"
        f"runs = cifar_lab.sweep(*{words!r})\n"
        "print(*[(run.config.seed, run.status) for run in runs])\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["started", "(0, 'finished') (1, 'finished')"]
    runs = cifar_lab.sweep(*words)
    assert [run.config.seed for run in runs] == [0, 1]


# --- what a program has set in torch, and its threads, change no result; nothing stays behind -----

AMBIENT_WORDS = (*TINY, "training.epochs=1", "precision=fp32")


@contextlib.contextmanager
def changed(read: Callable[[], Any], write: Callable[[Any], None], value: Any) -> Iterator[None]:
    before = read()
    write(value)
    try:
        yield
        assert read() == value  # as the program had it
    finally:
        write(before)


def mkldnn_off() -> contextlib.AbstractContextManager[None]:
    backend = torch.backends.mkldnn
    return changed(lambda: backend.enabled, lambda on: setattr(backend, "enabled", on), False)


@contextlib.contextmanager
def no_command_line() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(sys, "argv")
        yield


AMBIENT: dict[str, Callable[[], Any]] = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "default device": lambda: torch.device("meta"),
    "default dtype": lambda: changed(
        torch.get_default_dtype, torch.set_default_dtype, torch.float64
    ),
    "precision of products": lambda: changed(
        torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"
    ),
    "precision of products by its newer name": lambda: changed(
        lambda: torch.backends.mkldnn.matmul.fp32_precision,  # type: ignore[attr-defined]
        lambda value: setattr(torch.backends.mkldnn.matmul, "fp32_precision", value),  # type: ignore[attr-defined]
        "bf16",
    ),
    "mkldnn": mkldnn_off,
    "logging": lambda: changed(
        lambda: logging.root.manager.disable, logging.disable, logging.CRITICAL
    ),
    "no sys.argv": no_command_line,
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> cifar_lab.Run:
    return cifar_lab.run(*AMBIENT_WORDS, f"output_dir={tmp_path_factory.mktemp('plain')}")


def logits(run: cifar_lab.Run) -> Any:
    return RunDir(run.path).read_predictions().logits


@pytest.mark.parametrize(
    "names",
    [tuple(AMBIENT), *(pytest.param((name,), marks=pytest.mark.slow) for name in AMBIENT)],
    ids=lambda names: names[0] if len(names) == 1 else "all",
)
def test_a_run_under_other_settings_of_torch_has_the_same_bits(
    names: tuple[str, ...], plain: cifar_lab.Run, tmp_path: Path
) -> None:
    pictures = np.zeros((2, 32, 32), np.uint8)
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(AMBIENT[name]())
        run = cifar_lab.run(*AMBIENT_WORDS, f"output_dir={tmp_path}")
        probabilities = run.predict(pictures)
        (weight, *_) = run.load_model().parameters()
        assert torch.is_autocast_enabled("cpu") == ("autocast" in names)
    assert np.array_equal(logits(run), logits(plain))
    assert np.array_equal(probabilities, plain.predict(pictures))
    assert (weight.dtype, weight.device.type) == (torch.float32, "cpu")
    assert not weight.is_inference()
    assert "test accuracy of the best weights" in (run.path / "train.log").read_text()


def test_runs_of_two_threads_do_not_mix(plain: cifar_lab.Run, tmp_path: Path) -> None:
    environment, hydra = dict(os.environ), GlobalHydra.instance().hydra
    method = multiprocessing.get_start_method()  # which settles it, as any library may
    with ThreadPoolExecutor(2) as pool:
        runs = [
            pool.submit(cifar_lab.run, *AMBIENT_WORDS, f"seed={seed}", f"output_dir={tmp_path}")
            for seed in (0, 1)
        ]
        configs = [
            pool.submit(cifar_lab.compose, *AMBIENT_WORDS, f"seed={seed}") for seed in range(4)
        ]
    assert np.array_equal(logits(runs[0].result()), logits(plain))
    assert [config.result().seed for config in configs] == [0, 1, 2, 3]
    assert dict(os.environ) == environment
    assert GlobalHydra.instance().hydra is hydra
    assert multiprocessing.get_start_method() == method


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


def test_another_source_is_another_model_and_a_comment_or_an_instance_is_not(notebook: Any) -> None:
    words = words_of({"model": notebook.Net})
    net = notebook.Net(10, (1, 8, 8), depth=3)
    assert words_of({"model": net}) == words_of({"model": notebook.Net, "model__depth": 3})
    commented = CELLS[2] + "\n# nothing"
    linecache.cache["<cell 2>"] = (0, None, commented.splitlines(keepends=True), "<cell 2>")
    notebook.images = torch.zeros(3)  # the name of an argument, which is another one
    assert words_of({"model": notebook.Net}) == words
    notebook.HIDDEN = 13
    assert words_of({"model": notebook.Net}) != words


class ThreeClasses(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64, 3))


def test_a_model_of_so_many_classes_as_the_data_have(data: tuple[Any, Any], tmp_path: Path) -> None:
    asked = {"output_dir": tmp_path / "out", **FAST}
    three = {"dataset": tuple(part[data[1] < 3] for part in data), **asked}
    assert cifar_lab.run(model=ThreeClasses, **three).status == "finished"
    with pytest.raises(UsageError, match=r"model returns \[2, 3\] .* must be \[2, 10\]"):
        cifar_lab.run(model=ThreeClasses, dataset=data, **asked)
    with pytest.raises(UsageError, match="was changed after it was made"):
        cifar_lab.run(model=ThreeClasses().append(nn.Tanh()), **three)
    with pytest.raises(UsageError, match="model returns tuple for 2 images"):
        build.check_logits((1, 2), 2, None)


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
        ({"output_dir": Path("my runs"), "name": "True"}, ["output_dir='my runs'", "name='True'"]),
        ({"deterministic": True, "model": "convnet"}, ["model=convnet", "deterministic=true"]),
        ({"lr": np.float32(0.5), "seed": np.int64(3)}, ["optimizer.lr=0.5", "seed=3"]),
        ({"lrr": 1, "name": "2024"}, ["lrr=1", "name='2024'"]),
    ],
)
def test_keyword_arguments_are_words(settings: dict[str, Any], words: list[str]) -> None:
    assert words_of(settings) == words


def test_wrong_objects_are_one_line(notebook: Any, data: tuple[Any, Any], tmp_path: Path) -> None:
    images, labels = data
    for dataset, message in (
        ((images * 16, labels), "must be integers from 0 to 255, or floats from 0 to 1"),
        ((images, labels, images), "dataset must be"),
        ([], "dataset must be"),
        ((images.reshape(400, 64), labels), r"the images have shape \(400, 64\); it must be"),
        (([[1], [1, 2]], [0, 1]), "dataset: all input arrays must have the same shape"),
        ((images.astype(int) - 1, labels), "the images are int64 from -1 to"),
        ((images, labels - 1), "labels are int64 .* needs one whole number from 0"),
        ((images, labels + 0.5), "labels are float64 .* needs one whole number from 0"),
        ((images, labels[:9]), "dataset: 400 images need as many labels, not 9"),
        (Dataset[Any](), "dataset: object of type 'Dataset' has no len"),
        ((torch.zeros(2, 8, 8, requires_grad=True), [0, 1]), "dataset: Can't call numpy"),
    ):
        with pytest.raises(UsageError, match=message):
            words_of({"dataset": dataset})
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
