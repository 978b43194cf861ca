"""Damages to the files of a finished run, of many kinds, and the commands that then read it."""

import json
import os
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

FILES = (
    *("config.yaml", "summary.json", "metrics.csv", "best.pt", "last.pt", "predictions.npz"),
    *("predictions_validation_scored.npz", "features.npz", "samples.npz", ".lock", "train.log"),
    *("classification_report.json", "figures"),
)
COMMANDS = (
    *(["evaluate", "run"], ["predict", "run", "picture.png"], ["summarize", "run"]),
    *(["compare", "run", "group/other"], ["export", "run", "--format", "safetensors"]),
    *(["train", "run"], ["train", "run", "plan=true"], ["summarize", ".", "--embed", "pca"]),
    *(["compare", "group/other", "run", "--embed", "pca"], ["summarize", "run", "--timing"]),
    *(["predict", "run", "picture.png", "--weights", "last"], ["evaluate", "run", "--device=cpu"]),
    ["train", "continue_from=run", "dataset=digits", "training.epochs=3", "device=cpu"],
)
NUMBERS = ("1" * 400, "-1", "0", "nan", "Infinity", "1e999", "1.5", "null", "true", '"x"')
TEXTS = ("", "x" * 3_000_000, "\x00", "\udcff", "ü", "a\nb", "../../x", "\x1b[31m", "[" * 5000)
ODD: tuple[Any, ...] = (None, 0, -1, 10**400, 1.5, True, "x", [], {}, [[[]]], {"a": {"b": 1}})


def damage(seed: int, number: int) -> tuple[list[str], Callable[[Path], object], str]:
    """Return a command, what happens to the folder before it, and a name for that."""
    chance = random.Random(f"{seed}:{number}")
    file = chance.choice(FILES)
    ways: list[tuple[str, Callable[[Path], object]]] = [
        ("removed", _remove),
        ("empty", partial(_write, b"")),
        ("a folder", _folder),
        ("a pipe", _pipe),
        ("a link to nowhere", partial(_link, "nowhere")),
        ("a link to itself", partial(_link, file)),
        ("a link to a device", partial(_link, "/dev/zero")),
        ("cut short", partial(_cut, chance.random())),
        ("bits flipped", partial(_flip, chance.getrandbits(32))),
        ("zeros inside", partial(_zero, chance.random())),
        ("doubled", _double),
        ("another file's content", partial(_copy, chance.choice(FILES))),
        ("bytes", partial(_write, chance.randbytes(chance.choice((1, 100, 100_000))))),
        ("text", partial(_write, _bytes(chance.choice(TEXTS)))),
        ("deep", partial(_write, b"a: " + b"[" * chance.choice((100, 2000, 100_000)))),
        ("deep mappings", partial(_write, b"{a: " * 3000)),
        ("aliases", partial(_write, b"a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n")),
        ("not readable", lambda path: path.chmod(0)),
    ]
    ways += [("edited", partial(_edit, chance.getrandbits(32)))] * 12
    name, way = chance.choice(ways)
    words = list(chance.choice(COMMANDS))

    def act(folder: Path) -> None:
        way(folder / "run" / file)

    return words, act, f"{file}: {name}"


def _bytes(text: str) -> bytes:
    return text.encode(errors="surrogateescape")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _write(content: bytes, path: Path) -> None:
    _remove(path)
    path.write_bytes(content)


def _folder(path: Path) -> None:
    _remove(path)
    path.mkdir()
    (path / "file").write_text("x")


def _pipe(path: Path) -> None:
    _remove(path)
    os.mkfifo(path)


def _link(target: str, path: Path) -> None:
    _remove(path)
    path.symlink_to(target)


def _content(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b"figures"


def _cut(share: float, path: Path) -> None:
    content = _content(path)
    _write(content[: int(share * len(content))], path)


def _flip(seed: int, path: Path) -> None:
    chance, content = random.Random(seed), bytearray(_content(path) or b"x")
    for _ in range(chance.choice((1, 1, 10, 1000))):
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    _write(bytes(content), path)


def _zero(share: float, path: Path) -> None:
    content = bytearray(_content(path))
    start = int(share * len(content))
    content[start : start + 200] = bytes(len(content[start : start + 200]))
    _write(bytes(content), path)


def _double(path: Path) -> None:
    _write(_content(path) * 2, path)


def _copy(other: str, path: Path) -> None:
    _write(_content(path.parent / other), path)


def _edit(seed: int, path: Path) -> None:
    """Change one value inside a file, in a way that leaves its format whole."""
    chance = random.Random(seed)
    if path.suffix == ".pt":
        _edit_checkpoint(chance, path)
    elif path.suffix == ".npz":
        _edit_arrays(chance, path)
    elif path.suffix == ".json":
        plain = json.loads(path.read_text())
        _put(chance, plain)
        _write(_bytes(json.dumps(plain)), path)
    elif path.suffix == ".yaml":
        import yaml

        plain = yaml.safe_load(path.read_text())
        _put(chance, plain)
        _write(_bytes(yaml.safe_dump(plain)), path)
    else:
        lines = _content(path).decode().splitlines() or [""]
        place = chance.randrange(len(lines))
        cells = lines[place].split(",")
        cells[chance.randrange(len(cells))] = chance.choice((*NUMBERS, *TEXTS))
        lines[place] = ",".join(cells)
        _write(_bytes("\n".join(lines) + "\n"), path)


def _put(chance: random.Random, plain: dict[str, Any]) -> None:
    """Replace, add or remove one value at any depth."""
    place = plain
    while True:
        name = chance.choice(sorted(place))
        if not isinstance(place[name], dict) or not place[name] or chance.random() < 0.3:
            break
        place = place[name]
    way = chance.random()
    if way < 0.15:
        del place[name]
    elif way < 0.25:
        place["new"] = chance.choice(ODD)
    else:
        place[name] = chance.choice((*ODD, "x" * 100_000, ["x"] * 10_000))


def _edit_checkpoint(chance: random.Random, path: Path) -> None:
    import torch

    state = torch.load(path, weights_only=True)
    where = state
    if chance.random() < 0.5 and isinstance(state.get("model"), dict):
        where = state["model"]
    name = chance.choice(sorted(where))
    tensors: tuple[Any, ...] = (torch.zeros(3, 3), torch.zeros(0), torch.tensor(float("nan")))
    if chance.random() < 0.2:
        del where[name]
    else:
        where[name] = chance.choice((*ODD[:3], *ODD[4:], *tensors))
    torch.save(state, path)


def _edit_arrays(chance: random.Random, path: Path) -> None:
    import numpy as np

    with np.load(path) as loaded:
        arrays = dict(loaded)
    name = chance.choice(sorted(arrays))
    old = arrays[name]
    flat = np.atleast_1d(old)
    changed: list[Any] = [
        *(flat[:0], flat[:-1], old[None], old[..., None], old.astype(str), np.array(["x"])),
        *(np.zeros(3), np.array(1), np.full(old.shape, np.nan)),
    ]
    if old.dtype.kind in "biuf":
        changed += [np.full_like(old, 10**6 % 127), -old.astype(np.int64)]
        changed += [old.astype(kind) for kind in (np.float16, np.complex64, np.int8)]
    if chance.random() < 0.2:
        del arrays[name]
    else:
        arrays[name] = chance.choice(changed)
    np.savez(path, **arrays)
