"""What may be the name of a folder or of a file."""

import re
import string
from pathlib import Path

from cifar_lab.config.schema import wrong
from cifar_lab.errors import UsageError, shorten

FILE_NAME = r"[\w][\w.+\- ]{0,99}"
_BEST_FILE_FIELDS = ("model", "acc", "lr", "opt", "act", "epoch")


def check_name(name: str) -> None:
    """Refuse a `name` that is not one or more plain folder names, such as `runs` or `lab/week3`."""
    parts = name.split("/")
    plain = all(
        re.fullmatch(FILE_NAME, p) and not p.endswith(" ") and len(p.encode()) <= 255 for p in parts
    )
    if not plain or len(name) > 200 or len(parts) > 4:
        raise wrong(
            "name",
            name,
            "a folder name of letters, digits, '.', '_' and '-', such as runs",
        )


def check_figure_name(name: str) -> None:
    """Refuse a name of a figure that could lead out of a run's folder."""
    if not re.fullmatch(FILE_NAME, name):
        raise UsageError(
            f"figures.{shorten(name)} is wrong: a figure has a file name of letters, "
            "digits, '.', '_' and '-', such as curves"
        )


def check_folder(key: str, folder: str) -> None:
    """Refuse what cannot be the name of a folder."""
    try:
        fits = all(len(part.encode()) <= 255 for part in Path(folder).parts)
    except UnicodeEncodeError:
        fits = False
    if not folder.strip() or not folder.isprintable() or not fits or len(folder) > 2000:
        raise wrong(key, folder, "the name of a folder")


def check_file_name(template: str) -> None:
    """Refuse a template for best.pt's second name that is not a plain file name."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise wrong("training.best_file_name", template, f"a template ({error})") from None
    plain = all(
        (field is None or field in _BEST_FILE_FIELDS)
        and (not spec or (field in ("acc", "lr") and re.fullmatch(r"\.\d{1,2}[fge]", spec)))
        and not conversion
        and re.fullmatch(r"[\w.+\- =]*", text)
        for text, field, spec, conversion in parts
    )
    own = ("best.pt", "last.pt", "last.previous.pt")
    ending = template.endswith((".pt", ".pth")) and not template.startswith(".")
    if not plain or not ending or template in own or len(template.encode()) > 150:
        fields = ", ".join(f"{{{name}}}" for name in _BEST_FILE_FIELDS)
        raise wrong(
            "training.best_file_name",
            template,
            f"a file name of letters, digits and {fields} that ends in .pt or .pth",
        )
