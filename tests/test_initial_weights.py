"""model.weights=FILE: any model starts from a file of weights, and the file's content counts."""

import shutil
from pathlib import Path

import pytest
import torch
from tiny_runs import config_of, train

from cifar_lab.config.identity import address
from cifar_lab.errors import UsageError
from cifar_lab.models.pretrained import load_file
from cifar_lab.runs.files import load_checkpoint
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.training.build import build_model
from cifar_lab.training.preflight import compose_checked


def test_a_model_of_ones_own_starts_from_a_file(tiny_finished: RunDir, tmp_path: Path) -> None:
    file = Path(shutil.copy(tiny_finished.best, tmp_path / "mine.pt"))
    run = train(tmp_path, f"model.weights={file}", "training.epochs=0")
    given, loaded = (load_checkpoint(path)["model"] for path in (file, run.last))
    assert all(torch.equal(loaded[name], tensor) for name, tensor in given.items())
    config = run.read_config()
    assert len(config.model["weights_sha256"]) == 64
    shutil.move(file, tmp_path / "other.pt")
    again = config_of(f"model.weights={tmp_path / 'other.pt'}", "training.epochs=0")
    assert address(again).name == run.path.name  # the content counts, not the place
    assert address(config_of("training.epochs=0")).name != run.path.name
    assert config_of("model.weights=null").model == config_of().model


def test_a_classifier_for_other_classes_starts_anew(tiny_finished: RunDir) -> None:
    config = config_of()
    model = build_model(config, 3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert load_file(model, str(tiny_finished.best), None)
    given = load_checkpoint(tiny_finished.best)["model"]
    for name, tensor in model.state_dict().items():
        kept = before if name.startswith("classifier.") else given
        assert torch.equal(tensor, kept[name]), name
    assert not load_file(build_model(config, 10), str(tiny_finished.best), None)


@pytest.mark.parametrize("words", [("model.hidden=8",), ("model=two_branch", "dropout=none")])
def test_weights_of_another_model_are_refused(
    words: tuple[str, ...], tiny_finished: RunDir
) -> None:
    line = ["dataset=digits", "device=cpu", *words, f"model.weights={tiny_finished.best}"]
    with pytest.raises(UsageError, match="these are not the weights of"):
        compose_checked(line)
