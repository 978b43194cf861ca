"""One's own data: one address for a folder however it is typed, found again from any folder."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from test_intake import write

from cifar_lab import evaluate, train
from cifar_lab.config.compose import compose
from cifar_lab.config.identity import address
from cifar_lab.config.run_config import load
from cifar_lab.runs.run_dir import find_runs

TINY = (
    *("dataset=image_folder", "dataset.image_shape=[1,8,8]", "model.widths=[2]", "model.hidden=4"),
    *("figures=none", "device=cpu", "training.epochs=1", "split.validation=0.3"),
)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
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
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
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
    from cifar_lab.training.data import load_dataset
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
