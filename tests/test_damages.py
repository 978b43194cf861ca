"""Damages x readers: what each command answers to each damaged file of a finished run.

A cell of the table is the exit code; "." is a reader that does not read that file. Every answer is
one line, without a traceback, within two seconds of CPU. Below, each file is damaged in each way.
"""

import io
import json
import os
import pickle
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from fixtures import Capture
from PIL import Image
from tiny_runs import copy_run

import cifar_lab
from cifar_lab import compare, evaluate, export, predict, summarize, train
from cifar_lab.errors import Damaged, RunFailed, UsageError
from cifar_lab.figures import pca
from cifar_lab.runs.files import load_checkpoint
from cifar_lab.runs.run_dir import RunDir

Damage = Callable[[Path], object]


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def put(content: str) -> Damage:
    return lambda path: path.write_text(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def zero(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[200:400] = bytes(200)
    path.write_bytes(content)


def tear(path: Path) -> None:
    path.write_text(path.read_text() + "3,0.1")


def put_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def put_row(row: str) -> Damage:
    def act(path: Path) -> None:
        path.write_text(path.read_text().splitlines()[0] + f"\n{row}\n")

    return act


def edit_yaml(**changes: Any) -> Damage:
    def act(path: Path) -> None:
        path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **changes}))

    return act


def edit_json(**changes: Any) -> Damage:
    return lambda path: path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_state(change: Callable[[dict[str, Any]], object]) -> Damage:
    def act(path: Path) -> None:
        state = load_checkpoint(path)
        change(state)
        torch.save(state, path)

    return act


def widen(state: dict[str, Any]) -> None:
    state["model"] |= dict.fromkeys(list(state["model"])[:2], torch.zeros(3, 3))


def put_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"format": 1, "model": Evil(path.parent / "evil")}))


def put_torch_pickle(path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"format": 1, "model": Evil(path.parent / "evil")}, buffer)
    path.write_bytes(buffer.getvalue())


def deflate(path: Path) -> None:
    """Replace a checkpoint by one that has the same entries, and a large one, compressed."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
        archive.writestr("archive/data/999", bytes(2**26))


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def swell(path: Path) -> None:
    os.truncate(path, 2**33)  # a sparse file: it takes no space


def put_object_array(path: Path) -> None:
    np.savez(path, logits=np.array([Evil(path.parent / "evil")], dtype=object))


def put_pickle_in_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("logits.npy", pickle.dumps(Evil(path.parent / "evil")))


READERS = ("train", "evaluate", "predict", "export", "summarize", "compare", "load_run")
BOMB = "a: &a [x,x]\nb: &b [*a,*a]\nc: &c [*b,*b]\nd: &d [*c,*c]\ne: &e [*d,*d]\nf: [*e,*e]"
TABLE: dict[str, tuple[str, Damage, str]] = {
    # what is wrong: the file, how it comes about, the exit codes in the order of READERS
    "no config": ("config.yaml", Path.unlink, "2222222"),
    "a folder for a config": ("config.yaml", put_folder, "2222222"),
    "an empty config": ("config.yaml", put(""), "2222122"),
    "a config that is cut": ("config.yaml", put("dataset: {name: dig"), "2222.22"),
    "a config that is a list": ("config.yaml", put("[]"), "2....22"),
    "a config of other keys": ("config.yaml", put("a: b"), "2222.22"),
    "a config with a word for a part": ("config.yaml", edit_yaml(dataset=3), "2222.22"),
    "a config that is no text": ("config.yaml", put("\x00"), "2222.22"),
    "a config that is code": (
        "config.yaml",
        put("x: !!python/object/apply:os.abort []"),
        "2222.22",
    ),
    "a config that explodes": ("config.yaml", put(BOMB), "2222.22"),
    "a deep config": ("config.yaml", put("[" * 5000), "2......"),
    "a config of megabytes": ("config.yaml", put("- {a: [1, 2], b: {}}\n" * 130_000), "2222.22"),
    "a config of gigabytes": ("config.yaml", swell, "2222.22"),
    "a pipe for a config": ("config.yaml", pipe, "2222122"),
    "a config of another model": (
        *("config.yaml", edit_yaml(model={"_target_": "os.system", "command": "mkdir evil"})),
        "2222.02",
    ),
    "no summary": ("summary.json", Path.unlink, ".2022.2"),
    "an empty summary": ("summary.json", put(""), "1101111"),
    "a summary that is cut": ("summary.json", cut, "1101.11"),
    "a summary that is a list": ("summary.json", put("[]"), "1101.11"),
    "a deep summary": ("summary.json", put("[" * 100_000), "1101.11"),
    "an unknown status": ("summary.json", edit_json(status="done"), "1101.11"),
    "a list for a status": ("summary.json", edit_json(status=[]), "1101.11"),
    "a script for a score": ("summary.json", edit_json(test_accuracy="<script>"), "1101.11"),
    "a figure elsewhere": ("summary.json", edit_json(figures=["../../x"]), "1101.11"),
    "a folder for metrics": ("metrics.csv", put_folder, ".....11"),
    "a field of megabytes": ("metrics.csv", put_row("1," + "1" * 3_000_000), "0...111"),
    "a torn row": ("metrics.csv", tear, "0....00"),
    "no weights": ("best.pt", Path.unlink, ".111..1"),
    "empty weights": ("best.pt", put(""), "..1...1"),
    "weights that are cut": ("best.pt", cut, "..1...1"),
    "a flipped bit": ("best.pt", flip, ".111..1"),
    "weights of other widths": ("best.pt", edit_state(widen), "..1...1"),
    "weights without a model": ("best.pt", edit_state(lambda s: s.pop("model")), "..1...1"),
    "weights that are null": ("best.pt", edit_state(lambda s: s.update(model=None)), "..1...1"),
    "weights that unpack to much more": ("best.pt", deflate, ".111..1"),
    "weights of eight gigabytes": ("best.pt", swell, ".111..1"),
    "weights that are code": ("best.pt", put_pickle, ".111..1"),
    "weights that are code in a zip": ("best.pt", put_torch_pickle, "..11..1"),
    "last weights that are code": ("last.pt", put_torch_pickle, ".1....."),
    "no predictions": ("predictions.npz", Path.unlink, "...2.0."),
    "empty predictions": ("predictions.npz", put(""), "...1.1."),
    "predictions that are no zip": ("predictions.npz", put("PK"), "...1.1."),
    "a flipped bit in predictions": ("predictions.npz", flip, "...1.1."),
    "predictions that are objects": ("predictions.npz", put_object_array, "...1.1."),
    "predictions that are code": ("predictions.npz", put_pickle_in_zip, "...1.1."),
}


def call(reader: str, run: RunDir, folder: Path) -> int:
    """Return the exit code of a command on a run, or of what cifar_lab.load_run raises."""
    if reader == "load_run":
        try:
            loaded = cifar_lab.load_run(run.path)
            _ = loaded.config, loaded.summary, loaded.metrics, loaded.load_model()
        except (UsageError, RunFailed) as error:
            print(f"cifar_lab: {error}", file=sys.stderr)
            return error.exit_code
        return 0
    picture = folder / "picture.png"
    Image.new("L", (32, 32)).save(picture)
    commands: dict[str, Callable[[], int]] = {
        "train": lambda: train.main([str(run.path)]),
        "evaluate": lambda: evaluate.main([str(run.path)]),
        "predict": lambda: predict.main([str(run.path), str(picture)]),
        "export": lambda: export.main([str(run.path), "--format", "safetensors"]),
        "summarize": lambda: summarize.main([str(run.path.parent)]),
        "compare": lambda: compare.main([str(run.path), str(run.path)]),
    }
    return commands[reader]()


@pytest.mark.parametrize("damage", TABLE)
def test_a_damaged_file_is_one_line_soon(
    damage: str, finished: RunDir, tmp_path: Path, capsys: Capture
) -> None:
    file, act, codes = TABLE[damage]
    act(finished.path / file)
    for reader, code in zip(READERS, codes, strict=True):
        if code == ".":
            continue
        started = time.process_time()
        assert call(reader, finished, tmp_path) == int(code), reader
        assert time.process_time() - started < 2, reader
        said = capsys.readouterr()
        assert "Traceback" not in said.out + said.err
        assert "CIFAR_LAB_DEBUG" not in said.err
        if code != "0" and reader == "summarize":  # the others of the folder are summarised
            assert finished.path.name in said.out or "holds no run" in said.err
        elif code != "0":
            (line,) = said.err.splitlines()
            assert line.startswith("cifar_lab: ")
            assert file in line or finished.path.name in line or "_target_" in line, reader
    assert not (finished.path / "evil").exists()


FILES = (
    *("config.yaml", "summary.json", "metrics.csv", "steps.csv", "best.pt", "last.pt", ".lock"),
    *("predictions.npz", "predictions_validation_scored.npz", "features.npz", "samples.npz"),
    *("train.log", "classification_report.json"),
)
WAYS = (Path.unlink, put(""), cut, flip, put_folder)


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("way", range(len(WAYS)))
def test_each_file_damaged_in_each_way_is_answered_by_each_command(
    way: int, file: str, finished: RunDir, tmp_path: Path, capsys: Capture
) -> None:
    for number, reader in enumerate(READERS):
        run = copy_run(finished, tmp_path / str(number))
        WAYS[way](run.path / file)
        assert call(reader, run, run.path.parent) in (0, 1, 2), reader
        said = capsys.readouterr()
        assert "Traceback" not in said.out + said.err, reader
        assert "CIFAR_LAB_DEBUG" not in said.err, reader


@pytest.mark.parametrize("damage", ["zeros", "another kind"])
def test_features_that_are_damaged_are_not_drawn(damage: str, finished: RunDir) -> None:
    if damage == "zeros":
        zero(finished.features_file)
    else:
        finished.write_arrays(finished.features_file, features=np.ones(3), labels=np.ones(3))
    with pytest.raises(Damaged):
        pca.draw(finished)
