"""Data that change after a run was started are noticed: by resume, continue_from and a result."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_runs import StopAt, every_step

from cifar_lab import evaluate, train
from cifar_lab.errors import Stopped
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.training.preflight import compose_checked
from cifar_lab.training.run import run_experiment

IMAGES = np.random.default_rng(0).integers(0, 256, (60, 3, 16, 16), dtype=np.uint8)
SMALL = (
    *("model=convnet_plain", "model.widths=[2,4]", "model.hidden=8", "figures=none", "device=cpu"),
    *("dataset.image_shape=[3,16,16]", "split.validation=12", "training.batch_size=12"),
    *("training.epochs=2", "threads=1", "dataset.mean=null", "dataset.std=null"),
)


class Data:
    """Sixty images of two classes in a file or a folder, and a run that trains on them."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.path = kind, folder / ("data.npz" if kind == "npz" else "pictures")
        source, output = f"dataset.source.path={self.path}", f"output_dir={folder / 'outputs'}"
        self.line = [f"dataset={kind}", source, output, *SMALL]
        self.write(IMAGES)

    def write(self, images: Any) -> None:
        if self.kind == "npz":
            np.savez(self.path, images=images, labels=np.arange(60) % 2)
            return
        for index, image in enumerate(images):
            path = self.path / ("ant", "bee")[index % 2] / f"{index:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.transpose(1, 2, 0)).save(path)

    def permute(self) -> None:
        self.write(IMAGES[::-1])

    def restore(self) -> None:
        time.sleep(0.01)  # so that the files have another time
        self.write(IMAGES)

    def run(self) -> RunDir:
        return RunDir.create(compose_checked(self.line).runs[0].config)


@pytest.fixture
def kind() -> str:
    return "npz"


@pytest.fixture
def data(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Data:
    monkeypatch.setenv("CIFAR_LAB_DATA", str(tmp_path / "data"))
    return Data(kind, tmp_path)


def refused(capsys: pytest.CaptureFixture[str], kind: str) -> str:
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"the data of dataset={kind} have changed since " in error
    assert "train_images: sha256 " in error
    assert "restore them, or train it again with rerun=true" in error
    return error


@pytest.mark.parametrize("kind", ["npz", "image_folder"])
def test_a_stopped_run_continues_on_the_same_data_only(
    data: Data, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = data.run()
    with monkeypatch.context() as patch:
        every_step(patch)
        with pytest.raises(Stopped):
            run_experiment(run, stop=StopAt(2))
    before = run.last.read_bytes()

    data.permute()
    assert train.main(data.line) == 3
    refused(capsys, data.kind)
    assert run.read_summary().status == "interrupted"
    assert run.last.read_bytes() == before

    data.restore()
    assert train.main(data.line) == 0
    assert "resumed at epoch 1, step 2" in run.log_file.read_text()
    assert run.read_summary().status == "finished"


def test_a_finished_run_is_shown_for_the_same_data_only(
    data: Data, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(data.line) == 0
    run = data.run()
    summary = run.read_summary()
    assert set(summary.dataset) > {"train_images", "train_labels", "test_images", "test_labels"}

    data.permute()
    scores = run.summary_file.read_bytes()
    assert train.main(data.line) == 3
    assert run.path.name in refused(capsys, data.kind)
    assert train.main([*data.line, "seed=0", "-m"]) == 3
    out, error = capsys.readouterr()
    assert "1 other data" in out
    assert "1 of 1 cells were left out: the data of dataset=" in error
    assert evaluate.main([str(run.path)]) == 3
    refused(capsys, data.kind)
    assert run.summary_file.read_bytes() == scores

    assert train.main([*data.line, "rerun=true"]) == 0
    assert run.read_summary().dataset["train_images"] != summary.dataset["train_images"]
    data.path.rename(data.path.with_name("elsewhere"))
    capsys.readouterr()
    assert train.main(data.line) == 0
    assert "finished before" in capsys.readouterr().out, "a result outlives its data"


def test_continue_from_needs_the_same_data(data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(data.line) == 0
    longer = [*data.line, f"continue_from={data.run().path}", "training.epochs=3"]
    data.permute()
    assert train.main(longer) == 3
    assert data.run().path.name in refused(capsys, data.kind)
    data.restore()
    assert train.main(longer) == 0


def test_known_data_are_recorded_with_their_checksums(tiny_finished: RunDir) -> None:
    checksums = tiny_finished.read_config().dataset.checksums
    assert tiny_finished.read_summary().dataset == {"name": "digits", **checksums}
