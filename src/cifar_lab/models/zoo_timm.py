"""Any model of timm with a convolution at its start and a linear layer at its end."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

from cifar_lab.errors import Unavailable, UsageError, first_line, missing_extra
from cifar_lab.models.pretrained import PretrainedModel, check_architecture, complete_file_settings


class TimmModel(PretrainedModel):
    """A model of timm with a head for the dataset's classes: `PretrainedModel`.

    ``architecture`` may have a tag, as in resnet18d.ra2_in1k. ``pretrained`` starts from the
    weights that timm publishes, ``weights`` from a file with a state dict. Raises UsageError for an
    unknown architecture and where a part cannot be changed as asked.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        num_classes: int,
        *,
        architecture: str,
        pretrained: bool = False,
        weights: str | None = None,
        weights_sha256: str | None = None,
        small_images: bool = False,
        normalisation: Literal["weights", "dataset"] = "weights",
    ) -> None:
        timm = _import_timm()
        network = timm.create_model(architecture, pretrained=False, num_classes=num_classes)
        head = network.get_classifier()
        names = [name for name, part in network.named_modules() if part is head]
        if len(names) != 1:
            raise UsageError(
                f"model.architecture={architecture} cannot be used: it has several heads, or none"
            )
        super().__init__(
            network,
            names[0],
            architecture=architecture,
            channels=image_shape[0],
            small_images=small_images,
            published=pretrained,
            weights=weights,
            weights_sha256=weights_sha256,
        )

    @staticmethod
    def complete_settings(
        settings: dict[str, Any],
    ) -> tuple[dict[str, Any], tuple[list[float], list[float]] | None]:
        """Return the settings with what they leave open, and the mean and std to normalise with.

        With `pretrained` the architecture gets the tag of its weights, and a file gets its digest.
        The mean and std are three numbers each, or None if the dataset's are to be used.
        """
        timm = _import_timm()
        name, pretrained = settings["architecture"], settings.get("pretrained", False)
        architecture, _, tag = name.partition(".")
        check_architecture(architecture, "timm", timm.list_models())
        if tag:
            check_architecture(name, "timm", timm.list_pretrained(f"{architecture}.*"))
        published = timm.get_pretrained_cfg(name, allow_unregistered=False)
        if pretrained and settings.get("weights") is not None:
            raise UsageError(
                "model.pretrained=true is wrong: model.weights names a file; set one of them"
            )
        if pretrained and not (published.url or published.hf_hub_id):
            raise UsageError(
                f"model.pretrained=true is wrong: timm publishes no weights of {name}; set "
                "model.pretrained=false"
            )
        settings = complete_file_settings(settings, "null or a file (timm's own: pretrained=true)")
        if pretrained and not tag and published.tag:
            settings = {**settings, "architecture": f"{name}.{published.tag}"}
        has_weights = pretrained or settings.get("weights") is not None
        if not has_weights or settings.get("normalisation") == "dataset":
            return settings, None
        return settings, (list(published.mean), list(published.std))

    def fetch_published_weights(self) -> Mapping[str, Tensor]:
        """Return timm's own weights, downloaded unless they are in the cache of its hub."""
        try:
            source = _import_timm().create_model(self.architecture, pretrained=True)
        except (OSError, RuntimeError, ValueError) as error:
            raise Unavailable(
                f"model.pretrained=true: timm's weights of {self.architecture} cannot be fetched: "
                f"{first_line(error)}; model.weights=FILE loads a file"
            ) from None
        state: Mapping[str, Tensor] = source.state_dict()
        return state


def _import_timm() -> Any:
    try:
        import timm
    except ImportError:
        raise missing_extra("model=timm", "timm", "timm") from None
    return timm
