"""Python objects as words of a command line: a class, an array, a keyword argument.

A run is what its config says, so that it can be loaded anywhere. What is handed over as an object
is therefore written down first: arrays into a file that `dataset=npz` reads, and a class of a
notebook into a module, with what it uses. Both lie below the data folder, under the hash of their
content, and the run's folder gets a copy of the module.
"""

import ast
import contextlib
import hashlib
import importlib
import inspect
import json
import linecache
import re
import symtable
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from torch.utils.data import Dataset

from cifar_lab.config import targets
from cifar_lab.config.command_line import OTHER_NAMES, default_settings, setting_keys
from cifar_lab.config.run_config import RunConfig
from cifar_lab.datasets import ARRAYS
from cifar_lab.datasets.store import data_root
from cifar_lab.errors import UsageError, first_line, shorten
from cifar_lab.runs.files import replacing, write_text
from cifar_lab.training.build import build_model

_INJECTED = ("image_shape", "num_classes", "activation", "conv_dropout", "dense_dropout")


def words_of(settings: Mapping[str, Any]) -> list[str]:
    """Return the words for keyword arguments: `lr` is optimizer.lr, `model__width` model.width.

    A model may be a class or an instance, a dataset (images, labels) or a torch Dataset. UsageError
    where an object cannot be written down.
    """
    left = dict(settings)
    model, dataset = left.pop("model", None), left.pop("dataset", None)
    words = [f"model={model}"] if isinstance(model, str) else []
    if not isinstance(model, str | None):
        words = _model_words(model, {k[7:]: left.pop(k) for k in list(left) if k[:7] == "model__"})
    if dataset is not None:
        words += [f"dataset={dataset}"] if isinstance(dataset, str) else _dataset_words(dataset)
    return words + [f"{(key := _key(name))}={_value(value, key)}" for name, value in left.items()]


def _key(name: str) -> str:
    """Return the setting that a keyword means, or itself, which is refused if there is none."""
    keys, name = setting_keys(), name.replace("__", ".")
    leaf = OTHER_NAMES.get(name, name)
    same = [key for key in keys if key.rpartition(".")[2] == leaf]
    own = [key for key in same if key.startswith(("optimizer.", "training."))]
    return name if name in keys else (own or same or [name])[0]


def _value(value: Any, key: str = "") -> str:
    if isinstance(value, str | Path):
        is_text = isinstance(default_settings().get(key), str)  # "2024" is no number, "true" text
        word = r"(?i)(?!(null|true|false|nan|inf)$)[^\W\d][\w./-]*"
        text, plain = str(value), word if is_text else r"[\w./-]*"
        return text if re.fullmatch(plain, text) else "'" + text.replace("'", r"\'") + "'"
    return json.dumps(value, default=_of_numpy)


def _of_numpy(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise UsageError(f"{shorten(repr(value))} cannot be written down as a setting")


def _is_plain(value: Any) -> bool:
    with contextlib.suppress(ValueError, SyntaxError):
        return bool(ast.literal_eval(repr(value)) == value)
    return False


def _model_words(model: nn.Module | type[nn.Module], settings: dict[str, Any]) -> list[str]:
    """Return the words for a class or an instance, as an option of a folder made for it."""
    kind = model if isinstance(model, type) else type(model)
    if not issubclass(kind, nn.Module):
        raise UsageError(
            f"model={shorten(repr(model))} is wrong: it must be the name of an option, or an "
            "nn.Module, as a class or an instance"
        )
    if not isinstance(model, type):
        settings = _arguments(model) | settings
    module = kind.__module__
    parts: dict[str, str] = {}
    if _is_of_notebook(module):
        _add_source(kind.__name__, kind, parts)
        module = f"own_{hashlib.sha256(''.join(parts.values()).encode()).hexdigest()[:8]}"
    option = {"_target_": f"{module}.{kind.__qualname__}", **settings}
    content = json.dumps(option, sort_keys=True, default=_of_numpy)
    folder = data_root() / "own" / hashlib.sha256(content.encode()).hexdigest()[:12]
    (folder / "model").mkdir(parents=True, exist_ok=True)
    write_text(folder / "model" / f"{kind.__name__}.yaml", content + "\n")  # JSON is YAML
    if parts:
        write_text(folder / f"{module}.py", "".join(parts.values()))
        sys.path.append(str(folder))
        importlib.invalidate_caches()
    words = ["--config-dir", str(folder), f"model={kind.__name__}"]
    return words if module.startswith("torch.") else [*words, f"trust={module.split('.')[0]}"]


def _is_of_notebook(module: str) -> bool:
    """Whether a module cannot be imported elsewhere: a notebook's, a prompt's or a script's."""
    return module == "__main__" or getattr(sys.modules.get(module), "__file__", None) is None


def _arguments(model: nn.Module) -> dict[str, Any]:
    """Return what an instance was made with, if it keeps that under the names of the arguments."""
    kept = {}
    for name, parameter in inspect.signature(type(model)).parameters.items():
        if name not in _INJECTED and parameter.kind is not parameter.VAR_KEYWORD:
            kept[name] = getattr(model, name, parameter.default)
            if not _is_plain(kept[name]):
                raise UsageError(
                    f"the {type(model).__name__} cannot be built again: it does not keep its "
                    f"argument {name}; pass the class, and model__{name}=VALUE"
                )
    return kept


def check_instance(model: Any, config: RunConfig) -> None:
    """Refuse an instance with other layers than its class makes, as after `model.fc = ...`."""
    if isinstance(model, nn.Module):
        # Layers whose sizes are injected, as of another number of classes, have the same names.
        injected = any(targets.takes(config.model, "model", name) for name in _INJECTED)
        both = (build_model(config, 10), model)
        built, given = (m.state_dict().keys() if injected else repr(m) for m in both)
        if built != given:
            raise UsageError("model was changed after it was made; make the change in its class")


def _add_source(name: str, value: Any, parts: dict[str, str]) -> None:
    """Add to `parts` the line or the definition of a name, behind those of all that it uses."""
    if name in parts:
        return
    home = str(getattr(value, "__module__", None))
    own_name = getattr(value, "__name__", name)
    if isinstance(value, types.ModuleType):
        parts[name] = f"import {own_name} as {name}\n"
    elif isinstance(value, type | types.FunctionType) and _is_of_notebook(home):
        source, namespace = _definition(value), vars(sys.modules[home])
        parts[name] = ""  # now: a definition may use itself
        for used in _global_names(symtable.symtable(source, name, "exec")):
            if used in namespace:
                _add_source(used, namespace[used], parts)
        del parts[name]
        parts[name] = f"\n\n{source}\n"
    elif getattr(sys.modules.get(home), own_name, None) is value:
        parts[name] = f"from {home} import {own_name} as {name}\n"
    elif _is_plain(value):
        parts[name] = f"{name} = {value!r}\n"
    else:
        raise UsageError(
            f"model: {name} is {shorten(repr(value))}, which cannot be written down; define "
            "the model in a module, and pass its class"
        )


def _global_names(scope: symtable.SymbolTable) -> Iterator[str]:
    """Yield the names that a definition takes from its module, at any depth."""
    yield from (symbol.get_name() for symbol in scope.get_symbols() if symbol.is_global())
    for inner in scope.get_children():
        yield from _global_names(inner)


def _definition(value: Any) -> str:
    """Return the source of a class or function, from its file or from the cell of a notebook.

    `inspect` does not know the source of a notebook's class, but those of its methods.
    """
    codes = [getattr(item, "__code__", None) for item in [value, *vars(value).values()]]
    for file in {code.co_filename for code in codes if code is not None}:
        for node in ast.walk(ast.parse("".join(linecache.getlines(file)))):
            if getattr(node, "name", None) == value.__name__:
                return ast.unparse(node)
    raise UsageError(
        f"the source of {value.__name__} cannot be had; define it in a module, my_nets.py, and "
        "pass its class"
    )


def _dataset_words(dataset: Any) -> list[str]:
    """Return the words for images and labels, which are kept in a file under their hash.

    `dataset` is (images, labels), with (test_images, test_labels) behind them, or a torch Dataset
    of pairs, or one for training and one for testing.
    """
    parts = list(dataset) if isinstance(dataset, tuple | list) else [dataset]
    names = [str(name) for part in parts[:1] for name in getattr(part, "classes", [])]
    try:
        if all(isinstance(part, Dataset) for part in parts):
            pairs = [[part[index] for index in range(len(part))] for part in parts]
            parts = [column for part in pairs for column in zip(*part, strict=True)]
        if len(parts) not in (2, 4):
            raise UsageError(
                "dataset must be (images, labels), (images, labels, test_images, test_labels), a "
                "torch Dataset, or two of them"
            )
        keys = ("images", "labels") if len(parts) == 2 else ARRAYS
        arrays: dict[str, Any] = {
            key: _pixels(part) if "images" in key else _labels(part)
            for key, part in zip(keys, parts, strict=True)
        }
    except (TypeError, ValueError, RuntimeError) as error:  # on a GPU, of several sizes, ...
        raise UsageError(f"dataset: {first_line(error)}") from error
    counts = [len(array) for array in arrays.values()]
    for images, labels in zip(counts[::2], counts[1::2], strict=True):
        if images != labels:
            raise UsageError(f"dataset: {images:,} images need as many labels, not {labels:,}")
    if names:
        arrays["class_names"] = np.array(names)
    digest = hashlib.sha256(repr([(k, a.shape) for k, a in arrays.items()]).encode())
    for array in arrays.values():
        digest.update(np.ascontiguousarray(array).tobytes())
    path = data_root() / "own" / f"{digest.hexdigest()[:16]}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        with replacing(path) as handle:
            np.savez(handle, **arrays)
    shape = arrays[keys[0]].shape[1:]
    shape = (1, *shape) if len(shape) == 2 else shape
    shape = shape if shape[0] in (1, 3) else (shape[2], *shape[:2])
    words = ["dataset=npz", f"dataset.source.path={_value(path)}", "dataset.mean=auto"]
    return [*words, "dataset.std=auto", f"dataset.image_shape={json.dumps(list(shape))}"]


def _pixels(images: Any) -> "np.ndarray[Any, Any]":
    """Return images as uint8; floats from 0 to 1 are scaled to 255."""
    pixels = np.stack([np.asarray(image) for image in images])
    if pixels.ndim not in (3, 4):
        right = "(N, H, W), (N, H, W, C) or (N, C, H, W)"
        raise UsageError(f"dataset: the images have shape {pixels.shape}; it must be {right}")
    kind, low, high = pixels.dtype.kind, float(pixels.min()), float(pixels.max())
    if not 0 <= low <= high <= {"u": 255, "i": 255, "f": 1}.get(kind, -1):
        raise UsageError(
            f"dataset: the images are {pixels.dtype} from {low:g} to {high:g}; they must be "
            "integers from 0 to 255, or floats from 0 to 1"
        )
    return (np.round(255 * pixels) if kind == "f" else pixels).astype(np.uint8)


def _labels(labels: Any) -> "np.ndarray[Any, Any]":
    """Return labels, whole numbers from 0, as int64."""
    array = np.asarray(labels)
    if array.dtype.kind not in "iub" or array.ndim != 1 or (array < 0).any():
        problem = f"labels are {array.dtype} {array.shape}; an image needs one whole number from 0"
        raise UsageError(f"dataset: the {problem}")
    return array.astype(np.int64)


def keep_source(words: Sequence[str], run_folder: Path) -> None:
    """Copy the module of a notebook's class, of which there are `words_of`, into a run's folder."""
    if "--config-dir" in words:
        for path in Path(words[words.index("--config-dir") + 1]).glob("own_*.py"):
            write_text(run_folder / path.name, path.read_text(encoding="utf-8"))
