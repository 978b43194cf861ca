"""Any classification model of torchvision, with or without its published weights."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from cifar_lab.errors import Unavailable, first_line
from cifar_lab.models.pretrained import PretrainedModel, check_architecture, complete_file_settings

# Their auxiliary classifiers would be a second result in training.
_AUXILIARY = {"googlenet": ("aux1.", "aux2."), "inception_v3": ("AuxLogits.",)}


class TorchvisionModel(PretrainedModel):
    """A classification model of torchvision with a head for the dataset's classes.

    ``weights`` is None, the name of weights that torchvision publishes (DEFAULT, IMAGENET1K_V1,
    ...) or a file with a state dict. The rest is as in `PretrainedModel`. Raises UsageError for an
    unknown architecture and where a part cannot be changed as asked.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        num_classes: int,
        *,
        architecture: str,
        weights: str | None = None,
        weights_sha256: str | None = None,
        small_images: bool = False,
        normalisation: Literal["weights", "dataset"] = "weights",
    ) -> None:
        from torchvision.models import get_model, get_model_weights

        known = architecture in _AUXILIARY
        settings: dict[str, Any] = {"aux_logits": False, "init_weights": True} if known else {}
        network = get_model(architecture, weights=None, num_classes=num_classes, **settings)
        linear = [name for name, part in network.named_modules() if isinstance(part, nn.Linear)]
        super().__init__(
            network,
            linear[-1] if linear else "",
            architecture=architecture,
            channels=image_shape[0],
            small_images=small_images,
            published=weights in get_model_weights(architecture).__members__,
            weights=weights,
            weights_sha256=weights_sha256,
        )
        self._not_loaded += _AUXILIARY.get(architecture, ())

    @staticmethod
    def complete_settings(
        settings: dict[str, Any],
    ) -> tuple[dict[str, Any], tuple[list[float], list[float]] | None]:
        """Return the settings with what they leave open, and the mean and std to normalise with.

        DEFAULT becomes the name of the weights it stands for, and a file gets its digest. The mean
        and std are three numbers each, or None if the dataset's are to be used.
        """
        from torchvision import models

        check_architecture(settings["architecture"], "torchvision", models.list_models(models))
        published = models.get_model_weights(settings["architecture"])
        weights = settings.get("weights")
        if weights in published.__members__:
            settings = {**settings, "weights": published[weights].name, "weights_sha256": None}
        else:
            names = ", ".join(published.__members__)
            settings = complete_file_settings(settings, f"null, {names} or a file")
        if weights is None or settings.get("normalisation") == "dataset":
            return settings, None
        entry = published[weights] if weights in published.__members__ else published.DEFAULT
        preparation = entry.transforms()
        return settings, (list(preparation.mean), list(preparation.std))

    def fetch_published_weights(self) -> Mapping[str, Tensor]:
        """Return torchvision's own weights, downloaded unless they are in torch.hub's folder."""
        from torchvision.models import get_model_weights

        entry = get_model_weights(self.architecture)[self.weights]
        try:
            state: Mapping[str, Tensor] = entry.get_state_dict(progress=False, check_hash=True)
        except (OSError, RuntimeError) as error:
            raise Unavailable(
                f"model.weights={self.weights} of {self.architecture} cannot be fetched from "
                f"{entry.url}: {first_line(error)}; model.weights=FILE loads a file"
            ) from None
        return state
