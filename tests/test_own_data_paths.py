"""One's own data: one address for a folder however it is typed, found again from any folder."""

import re
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures import Capture, Patch
from PIL import Image
from test_intake import write
from tiny_runs import TINY as TINY_DIGITS
from tiny_runs import StopAt, every_step

from cifar_lab import evaluate, train
from cifar_lab.config.compose import compose
from cifar_lab.config.identity import address
from cifar_lab.config.run_config import RunConfig, load
from cifar_lab.errors import Stopped, UsageError
from cifar_lab.runs.run_dir import RunDir, find_runs
from cifar_lab.training.build import load_splits
from cifar_lab.training.preflight import compose_checked
from cifar_lab.training.run import run_experiment

TINY = (
    *("dataset=image_folder", "dataset.image_shape=[1,8,8]", "model.widths=[2]", "model.hidden=4"),
    *("figures=none", "device=cpu", "training.epochs=1", "split.validation=0.3"),
)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: Patch) -> Path:
    """Work in a folder that has pictures of two classes."""
    folder = tmp_path / "project"
    write(folder / "pics", "ab", 8)
    monkeypatch.setenv("CIFAR_LAB_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(folder)
    return folder


def test_a_folder_has_one_address_however_it_is_typed(project: Path) -> None:
    names = ("pics", "pics/", "./pics", "x/../pics", str(project / "pics"))
    configs = [compose([*TINY, f"dataset.source.path={name}"]).runs[0].config for name in names]
    assert len({address(config) for config in configs}) == 1
    assert {config.dataset.source["path"] for config in configs} == {"pics"}
    outside = compose([*TINY, "dataset.source.path=../pics"]).runs[0].config.dataset
    assert (outside.source["path"], outside.relative_to) == (str(project.parent / "pics"), None)


def test_a_run_finds_its_pictures_from_any_folder(
    project: Path, monkeypatch: Patch, capsys: Capture
) -> None:
    assert train.main([*TINY, "dataset.source.path=pics"]) == 0
    (run,) = find_runs(project / "outputs")
    (project.parent / "other").mkdir()
    monkeypatch.chdir(project.parent / "other")
    assert load(run.config_file).dataset.relative_to == str(project)
    capsys.readouterr()
    assert evaluate.main([str(run.path)]) == 0, capsys.readouterr().err
    assert train.main([str(run.path)]) == 0
    assert "another run" not in capsys.readouterr().out
    assert [found.path for found in find_runs(project.parent)] == [run.path]
    shutil.move(project / "pics", project.parent / "other" / "pics")
    assert evaluate.main([str(run.path)]) == 0  # with the files beside where one works


def test_a_limit_takes_a_share_of_each_class(project: Path) -> None:
    from cifar_lab.training.build import load_dataset
    from cifar_lab.training.preflight import compose_checked

    words = ["dataset=digits", "device=cpu"]
    whole = compose_checked(words).runs[0].config
    part = compose_checked([*words, "dataset.limit=300"]).runs[0].config
    assert address(part) != address(whole)
    arrays = load_dataset(part.dataset)
    counts = np.bincount(arrays.train_labels)
    assert counts.sum() == 300
    assert counts.max() - counts.min() <= 2  # as in the whole set
    assert len(arrays.test_labels) == 360
    assert arrays.checksums["test_images"] == load_dataset(whole.dataset).checksums["test_images"]


# --- `dataset.mean=auto` and `dataset.std=auto` become numbers before a run has an address --------

AUTO = ("dataset.mean=auto", "dataset.std=auto")


def config(*overrides: str) -> RunConfig:
    return compose_checked([*TINY_DIGITS, *AUTO, *overrides]).runs[0].config


def test_the_numbers_are_those_of_the_training_images_alone() -> None:
    settings = config()
    train_split = load_splits(settings, "cpu").train
    pixels = train_split.images[train_split.indices].numpy() / 255
    assert settings.dataset.mean == [round(float(pixels.mean()), 4)]
    assert settings.dataset.std == [round(float(pixels.std()), 4)]
    assert config("split.seed=1").dataset.mean != settings.dataset.mean
    assert config("seed=1").dataset == settings.dataset


def test_each_channel_of_ones_own_images_has_its_numbers(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (40, 3, 8, 8), dtype=np.uint8)
    images[:, 1] //= 4
    save(tmp_path / "data.npz", images)
    dataset = of_file(tmp_path / "data.npz").dataset
    assert dataset.mean == pytest.approx([0.5, 0.125, 0.5], abs=0.02)
    assert dataset.std == pytest.approx([0.29, 0.07, 0.29], abs=0.02)
    images[:, 2] = 7
    save(tmp_path / "data.npz", images)
    with pytest.raises(UsageError, match=r"dataset\.std=auto: .* channel 2 of npz .* all the same"):
        of_file(tmp_path / "data.npz")


def save(path: Path, images: Any) -> None:
    np.savez(path, images=images, labels=np.arange(len(images)) % 2)


def of_file(path: Path) -> RunConfig:
    source = ["dataset=npz", f"dataset.source.path={path}", "dataset.image_shape=[3,8,8]"]
    return config(*source, "split.validation=4")


def test_the_folder_holds_numbers_and_the_same_line_finds_it(
    tmp_path: Path, capsys: Capture
) -> None:
    line = [*TINY_DIGITS, *AUTO, f"output_dir={tmp_path}", "training.epochs=1"]
    assert train.main(line) == 0
    run = RunDir(address(config(f"output_dir={tmp_path}", "training.epochs=1")))
    assert not re.search(r"(mean|std): auto", run.config_file.read_text())
    assert run.own_config().dataset == config().dataset
    capsys.readouterr()
    for again in (line, [str(run.path)], [*line, "-m"]):
        assert train.main(again) == 0
    assert capsys.readouterr().out.count("finished before") == 2
    assert len(list(tmp_path.glob("*/*/config.yaml"))) == 1
    assert evaluate.main([str(run.path)]) == 0
    assert train.main([*line, f"continue_from={run.path}", "training.epochs=2"]) == 0


def test_a_config_that_is_only_shown_loads_no_data(monkeypatch: Patch, capsys: Capture) -> None:
    def load(*_: object) -> None:
        raise AssertionError("data were loaded")

    monkeypatch.setattr("cifar_lab.training.build.load_dataset", load)
    assert train.main([*TINY_DIGITS, *AUTO, "--cfg", "job"]) == 0
    assert "mean: auto" in capsys.readouterr().out
    assert config("dataset.mean=[0.3]", "dataset.std=[0.4]").dataset.mean == [0.3]


# --- data that change after a run was started are noticed -----------------------------------------

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
def data(kind: str, tmp_path: Path, monkeypatch: Patch) -> Data:
    monkeypatch.setenv("CIFAR_LAB_DATA", str(tmp_path / "data"))
    return Data(kind, tmp_path)


def refused(capsys: Capture, kind: str) -> str:
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"the data of dataset={kind} have changed since " in error
    assert "train_images: sha256 " in error
    assert "restore them, or train it again with rerun=true" in error
    return error


@pytest.mark.parametrize("kind", ["npz", "image_folder"])
def test_a_stopped_run_continues_on_the_same_data_only(
    data: Data, monkeypatch: Patch, capsys: Capture
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


def test_a_finished_run_is_shown_for_the_same_data_only(data: Data, capsys: Capture) -> None:
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


def test_continue_from_needs_the_same_data(data: Data, capsys: Capture) -> None:
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
