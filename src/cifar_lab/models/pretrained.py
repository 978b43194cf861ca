"""What the models of torchvision and timm share: the head, the first layers, the given weights."""

import functools
import hashlib
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cifar_lab.errors import UsageError, first_line, missing_extra, shorten, shorten_path

# Where the networks of the ResNet kind have their first convolution and first pooling.
_STEMS = (("conv1", "maxpool"), ("features.conv0", "features.pool0"))


class PretrainedModel(nn.Module):
    """A network of another package, whose last linear layer is this model's ``classifier``.

    ``network`` is a network for images of three channels and ``num_classes`` classes, and ``head``
    the dotted name of its last layer. ``published``: it starts from the package's own weights, else
    from those of the file ``weights``, if there is one, whose digest is ``weights_sha256``.
    ``small_images`` makes the first convolution of a ResNet 3x3 with stride 1 and leaves out the
    first pooling. ``images`` are (B, *image_shape), ``features`` (B, inputs of the last layer), the
    result (B, num_classes) logits. Raises UsageError where a part cannot be changed as asked.
    """

    def __init__(
        self,
        network: nn.Module,
        head: str,
        *,
        architecture: str,
        channels: int,
        small_images: bool,
        published: bool,
        weights: str | None,
        weights_sha256: str | None,
    ) -> None:
        super().__init__()
        classifier = network.get_submodule(head)
        if not isinstance(classifier, nn.Linear):
            raise UsageError(
                f"model.architecture={architecture} cannot be used: it has no linear layer at its "
                "end, so its head cannot be separated from its features"
            )
        self.architecture = architecture
        self.published = published
        self.weights = weights
        self.weights_sha256 = weights_sha256
        self._head = head
        # Parameters of the published network that have no place here.
        self._not_loaded: tuple[str, ...] = ()
        network.set_submodule(head, nn.Identity())
        if small_images:
            self._use_small_stem(network)
        # The name of the convolution whose weights are summed over the channels.
        self._summed = _take_one_channel(network, architecture) if channels != 3 else None
        self.network = network
        self.classifier = classifier

    def features(self, images: Tensor) -> Tensor:
        """Return what the last linear layer sees (B, its inputs)."""
        output: Tensor = self.network(images)
        return output

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, num_classes)."""
        logits: Tensor = self.classifier(self.features(images))
        return logits

    def load_initial_weights(self, *, download: bool) -> None:
        """Load the weights that training starts from, if any; the head keeps its own.

        Without `download` only a file is loaded. Raises UsageError for a file that is none, is not
        the one that the run was made with, or belongs to another architecture, and Unavailable
        where published weights cannot be fetched.
        """
        if self.published:
            if download:
                self._load(self.fetch_published_weights())
        elif self.weights is not None:
            # A run that has its own weights does not need the file any more.
            if not download and self.weights_sha256 and not Path(self.weights).exists():
                return
            _check_digest(self.weights, self.weights_sha256)
            self._load(_of_network(_read_state_dict(Path(self.weights))))

    def fetch_published_weights(self) -> Mapping[str, Tensor]:
        """Return the package's own weights; Unavailable if they cannot be fetched now."""
        raise NotImplementedError

    def _load(self, published: Mapping[str, Tensor]) -> None:
        skipped, summed = (f"{self._head}.", *self._not_loaded), f"{self._summed}.weight"
        given = {
            name: tensor.sum(1, keepdim=True) if name == summed else tensor
            for name, tensor in published.items()
            if not name.startswith(skipped)
        }
        _load_fitting(self.network, given, str(self.weights), self.architecture, skipped)

    def _use_small_stem(self, network: nn.Module) -> None:
        """Let the first convolution be 3x3 with stride 1, and leave out the first pooling."""
        modules = dict(network.named_modules())
        for stem, pool in _STEMS:
            # In timm's ResNet-D, the stem is three convolutions.
            names = [name for name in (stem, f"{stem}.0") if name in modules]
            old = modules[names[-1]] if names else None
            if not isinstance(modules.get(pool), nn.MaxPool2d) or not isinstance(old, nn.Conv2d):
                continue
            if old.stride != (2, 2) or old.groups != 1:
                continue
            new = nn.Conv2d(
                old.in_channels, old.out_channels, 3, padding=1, bias=old.bias is not None
            )
            nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
            network.set_submodule(names[-1], new)
            network.set_submodule(pool, nn.Identity())
            if old.kernel_size != (3, 3):
                self._not_loaded += (f"{names[-1]}.",)
            return
        raise UsageError(
            f"model.small_images=true is wrong: {self.architecture} has no first convolution of "
            "stride 2 with a pooling after it, as the ResNets have; set model.small_images=false"
        )


def load_file(model: nn.Module, weights: str, digest: str | None) -> bool:
    """Load a file of weights into any model; return whether its `classifier` was left as it is.

    It is where the file's is of another shape, for other classes. Raises UsageError for a file that
    is none, is not the one with this SHA-256, or does not fit the rest of the model.
    """
    _check_digest(weights, digest)
    own, given = model.state_dict(), _read_state_dict(Path(weights))
    head = [name for name in own if name.startswith("classifier.") and name in given]
    is_other = any(own[name].shape != given[name].shape for name in head)
    skipped = ("classifier.",) if is_other else ()
    given = {name: tensor for name, tensor in given.items() if not name.startswith(skipped)}
    _load_fitting(model, given, weights, type(model).__name__, skipped)
    return is_other


def _load_fitting(
    module: nn.Module,
    given: Mapping[str, Tensor],
    weights: str,
    architecture: str,
    skipped: tuple[str, ...],
) -> None:
    """Load tensors whose names and shapes are those of a module, but for the `skipped` parts."""
    # Files of torch 0.4 and before have no count of batches, which nothing here uses.
    state = {
        name: tensor
        for name, tensor in module.state_dict().items()
        if name.startswith(skipped) or name.endswith("num_batches_tracked")
    }
    try:
        module.load_state_dict({**state, **given})
    except RuntimeError as error:
        raise UsageError(
            f"model.weights={shorten_path(Path(weights))} is wrong: these are not the weights of "
            f"{architecture}: {first_line(error, 300)}"
        ) from None


def check_architecture(name: str, package: str, known: list[str]) -> None:
    """Raise UsageError with the nearest names for an architecture that a package does not have."""
    if name not in known:
        near = get_close_matches(name, known, n=3, cutoff=0.4)
        guess = f"; the nearest are {', '.join(near)}" if near else ""
        raise UsageError(
            f"model.architecture={shorten(name)} is wrong: {package} has no such classification "
            f"model{guess}"
        )


def complete_file_settings(settings: dict[str, Any], right: str) -> dict[str, Any]:
    """Return a model's settings with the digest of its weights file; `right` says what else fits.

    A file that is gone is accepted if its digest is known: the run then has weights of its own.
    """
    weights, digest = settings.get("weights"), settings.get("weights_sha256")
    if weights is None:
        return {**settings, "weights_sha256": None}
    if not Path(weights).is_file():
        if digest:
            return settings
        raise UsageError(f"model.weights={shorten(weights)} is wrong: it must be {right}")
    return {**settings, "weights_sha256": _check_digest(weights, digest)}


def _check_digest(weights: str, expected: str | None) -> str:
    path = Path(weights)
    state = path.stat()
    digest = _sha256(path, state.st_mtime_ns, state.st_size)
    if expected is not None and expected != digest:
        raise UsageError(
            f"model.weights={shorten(weights)} has the SHA-256 {digest[:12]}, and not the "
            f"{shorten(expected[:12])} of model.weights_sha256; restore the file, or set "
            "model.weights_sha256=null for another run"
        )
    return digest


@functools.lru_cache(maxsize=16)
def _sha256(path: Path, changed: int, size: int) -> str:
    """Return a file's SHA-256; `changed` and `size` tell it from what it was before."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file of torch.save or of safetensors; nothing in it is executed.

    Files that hold the state dict as `state_dict` or `model` are read too, such as a run's best.pt.
    """
    where = f"model.weights={shorten_path(path)}"
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise missing_extra(where, "safetensors", "timm") from None
    except Exception:  # torch's unpickler fails on other files in any way, as with KeyError(101)
        raise UsageError(
            f"{where} cannot be read: it is damaged, or no state dict of torch.save or safetensors "
            "(a whole model, pickled, is none)"
        ) from None
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()
    ):
        raise UsageError(f"{where} is wrong: it must be a state dict, names with their tensors")
    return dict(content)


def _of_network(content: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of the network alone, of a file that holds a whole model of this kind."""
    if not all(key.startswith(("network.", "classifier.")) for key in content):
        return content
    return {k.removeprefix("network."): v for k, v in content.items() if k[0] == "n"}


def _take_one_channel(network: nn.Module, architecture: str) -> str:
    """Let the first convolution take images of one channel, as if repeated three times.

    Returns its name.
    """
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            if module.in_channels != 3 or module.groups != 1:
                break
            module.in_channels = 1
            module.weight = nn.Parameter(module.weight.detach().sum(1, keepdim=True))
            return str(name)
    raise UsageError(
        f"model.architecture={architecture} cannot be used: its first layer is no convolution of "
        "an image of three channels"
    )
