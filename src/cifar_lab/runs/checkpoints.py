"""Checkpoint files: tensors and plain values, so that reading one cannot run code."""

import hashlib
import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from cifar_lab.errors import Damaged, UsageError, first_line
from cifar_lab.runs.files import open_for_reading

CHECKPOINT_FORMAT = 1


def save_checkpoint(state: Mapping[str, Any], handle: IO[bytes]) -> None:
    """Write a checkpoint to an open file."""
    import torch

    # Through memory: on a full disk torch's own writer raises no OSError.
    buffer = io.BytesIO()
    torch.save({"format": CHECKPOINT_FORMAT, **state}, buffer)
    handle.write(buffer.getbuffer())


def weights_checksum(weights: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a model's tensors, with their names, shapes and types."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in weights.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Return a checkpoint's tensors and plain values, on the CPU.

    Raises Damaged if a bit of the file is wrong or it is not a checkpoint, and UsageError if a
    newer version wrote it.
    """
    import torch

    try:
        with open_for_reading(path) as handle:
            with zipfile.ZipFile(handle) as archive:
                broken = archive.testzip()
            if broken is not None:
                raise Damaged(f"{path} is damaged: the checksum of {broken} is wrong")
            handle.seek(0)
            state: dict[str, Any] = torch.load(handle, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise Damaged(f"{path} is missing") from None
    except Damaged:
        raise
    except Exception as error:  # torch.load refuses a damaged file in many ways
        raise Damaged(f"{path} is damaged: {first_line(error)}") from None
    found = state.get("format") if isinstance(state, dict) else None
    if not isinstance(found, int):
        raise Damaged(f"{path} is not a checkpoint of cifar_lab")
    if found > CHECKPOINT_FORMAT:
        raise UsageError(
            f"{path} has format {found}, this version reads up to {CHECKPOINT_FORMAT}: "
            "use the newer cifar_lab that wrote it"
        )
    return state
