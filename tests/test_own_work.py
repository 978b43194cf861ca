"""What docs/your_own.md promises, with the files that stand in it."""

import dataclasses
import importlib
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from fixtures import Capture, Patch
from PIL import Image

from cifar_lab import evaluate, predict, train
from cifar_lab.config import targets
from cifar_lab.config.identity import address
from cifar_lab.config.run_config import dump
from cifar_lab.errors import UsageError
from cifar_lab.runs.run_dir import find_runs
from cifar_lab.training import preflight
from cifar_lab.training.preflight import compose_checked

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "your_own.md").read_text(encoding="utf-8")
TINY = ["figures=none", "device=cpu"]


def files_of_the_page() -> dict[str, str]:
    """Return the files that the page shows: each code block under its file's name."""
    pattern = r"`([\w./]+\.(?:py|yaml))`[^`]*?\n\n```(?:python|yaml)\n(.*?)```"
    return dict(re.findall(pattern, PAGE, re.DOTALL))


def commands_of_the_page() -> list[list[str]]:
    """Return the page's commands, split into words, without `python -m cifar_lab.`."""
    blocks = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    return [shlex.split(line.removeprefix("python -m cifar_lab.")) for line in lines]


@pytest.fixture
def own(tmp_path: Path, monkeypatch: Patch) -> Iterator[Path]:
    """Lay the page's files, pictures and arrays into a folder, and work there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(targets, "_TRUSTED", set())
    monkeypatch.setattr(preflight, "_TRIED", {})  # another test's my_models is another module
    for name, text in files_of_the_page().items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(40) % 2
    images[labels == 1] //= 4
    np.savez(tmp_path / "pictures.npz", images=images, labels=labels)
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        folder = tmp_path / "pictures" / ("cat", "dog")[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).resize((40, 36)).save(folder / f"{index}.png")
    Image.fromarray(images[0]).resize((300, 200)).save(tmp_path / "photo.jpg")
    Image.fromarray(images[1][..., 0]).resize((20, 90)).save(tmp_path / "scan.png")
    yield tmp_path
    sys.modules.pop("my_models", None)


def test_own_options_train_evaluate_and_predict(own: Path, capsys: Capture) -> None:
    words = next(words for words in commands_of_the_page() if "optimizer=sign_sgd" in words)
    assert train.main([*words[1:], "training.epochs=1", *TINY]) == 0
    (run,) = find_runs(own / "outputs")
    summary = run.read_summary()
    assert summary.choices["model"] == "my_net"
    assert summary.choices["optimizer"] == "sign_sgd"
    assert summary.choices["activation"] == "squareplus"
    assert run.path.name.startswith("digits-my_net-sign_sgd-squareplus")
    assert evaluate.main([str(run.path), "--trust", "my_models"]) == 0
    capsys.readouterr()
    assert predict.main([str(run.path), "photo.jpg", "--trust", "my_models"]) == 0
    assert "photo.jpg" in capsys.readouterr().out


def test_own_code_runs_only_if_it_is_trusted(own: Path, capsys: Capture) -> None:
    arguments = ["--config-dir", "mine", "dataset=digits", "model=my_net", *TINY]
    assert train.main(arguments) == 2
    assert "add --trust my_models" in capsys.readouterr().err
    assert "my_models" not in sys.modules
    assert not (own / "outputs").exists()


@pytest.mark.parametrize("source", ["image_folder", "npz"])
def test_own_pictures_train_and_are_asked_about(
    own: Path, source: str, monkeypatch: Patch, capsys: Capture
) -> None:
    monkeypatch.setenv("CIFAR_LAB_DATA", str(own / "data"))
    words = next(w for w in commands_of_the_page() if f"dataset={source}" in w and w[0] == "train")
    small = ["model=convnet_plain", "model.widths=[4,8]", "model.hidden=16", "training.epochs=1"]
    assert train.main([*words[1:], *small, *TINY]) == 0
    (run,) = find_runs(own / "outputs")
    capsys.readouterr()
    assert predict.main([str(run.path), "photo.jpg", "scan.png", "--top", "2"]) == 0
    out = capsys.readouterr().out
    names = ("cat", "dog") if source == "image_folder" else ("0", "1")
    assert all(f" {name} " in out for name in names)


@pytest.mark.parametrize("trusting", ["--trust my_models", "trust=my_models", "trust=[my_models]"])
def test_trust_means_the_same_in_every_form(
    trusting: str, own: Path, capsys: Capture, monkeypatch: Patch
) -> None:
    def code(line: str) -> int:
        monkeypatch.setattr(targets, "_TRUSTED", set())
        name, *words = f"{line} {trusting}".split()
        main: Callable[[list[str]], int] = importlib.import_module(f"cifar_lab.{name}").main
        return main(words)

    chosen = "--config-dir mine dataset=digits model=my_net"
    for line in (f"train {chosen} plan=true device=cpu", f"describe {chosen}"):
        assert code(line) == 0, capsys.readouterr().err
    for line in (
        *("evaluate nowhere", "predict nowhere x.png", "export nowhere --format=pt2"),
        *("track nowhere tracker=tensorboard", "summarize nowhere", "compare nowhere x"),
        "reproduce nowhere",
    ):
        assert code(line) == 2
        assert "nowhere" in capsys.readouterr().err, line
        assert targets.trusted() == ["my_models"], line
    with pytest.raises(UsageError, match=r"such as my_nets for my_nets\.py"):
        targets.trust("my_models.py")


def test_a_config_of_somebodys_run_is_where_a_run_starts(own: Path, capsys: Capture) -> None:
    words = ["--config-dir", "mine", "dataset=digits", "model=my_net", *TINY, "training.epochs=7"]
    config = compose_checked([*words, "--trust", "my_models"]).runs[0].config
    (own / "friend.yaml").write_text(dump(config))
    assert train.main(["friend.yaml", "trust=my_models", "plan=true"]) == 0
    assert address(config).name in capsys.readouterr().out
    changed = compose_checked(["friend.yaml", "--trust", "my_models", "seed=3"]).runs[0].config
    assert changed == dataclasses.replace(config, seed=3)
    assert train.main(["friend.yaml", "optimizer.lrr=1"]) == 2
    assert "optimizer.lrr (did you mean lr?)" in capsys.readouterr().err
    (own / "half.yaml").write_text("seed: 3\n")
    assert train.main(["half.yaml"]) == 2
    assert "half.yaml: dataset is missing" in capsys.readouterr().err
