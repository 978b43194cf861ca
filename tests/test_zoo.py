"""Models of torchvision and timm, given weights, and fine-tuning from the command line."""

import hashlib
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fileserver import Behaviour, file_server
from fixtures import Capture, Patch
from test_damages import deflate
from tiny_runs import config_of
from tiny_runs import train as train_tiny
from torch import Tensor, nn
from torchvision import models as torchvision_models
from torchvision.models import get_model, list_models

from cifar_lab import evaluate, train
from cifar_lab.config.identity import address
from cifar_lab.errors import Unavailable, UsageError
from cifar_lab.models.pretrained import load_file
from cifar_lab.models.zoo_torchvision import TorchvisionModel
from cifar_lab.runs.files import load_checkpoint
from cifar_lab.runs.run_dir import RunDir, find_runs
from cifar_lab.training.build import build_model
from cifar_lab.training.preflight import compose_checked

RGB, GRAY = (3, 32, 32), (1, 32, 32)
SMALL = ["dataset=digits", "device=cpu", "threads=1", "figures=none", "dropout=none"]
SHUFFLENET = ["model=torchvision", "model.architecture=shufflenet_v2_x0_5"]


def build(architecture: str, image_shape: tuple[int, int, int] = RGB, **settings: Any) -> Any:
    torch.manual_seed(0)
    return TorchvisionModel(image_shape, 10, architecture=architecture, **settings).eval()


def published(architecture: str) -> nn.Module:
    """The network of a package as it publishes it, with random weights and statistics."""
    torch.manual_seed(1)
    network: nn.Module = get_model(architecture, weights=None)
    for name, tensor in network.state_dict().items():
        if name.endswith(("running_mean", "running_var")):
            tensor.uniform_(0.5, 1.5)
    return network


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A file with weights of shufflenet_v2_x0_5 for 1,000 classes."""
    file = tmp_path / "shufflenet.pt"
    torch.save(published("shufflenet_v2_x0_5").state_dict(), file)
    return file


def one(*overrides: str) -> Any:
    (run,) = compose_checked([*SMALL, *overrides]).runs
    return run.config


@pytest.mark.parametrize("name", ["resnet18", "shufflenet_v2_x0_5"])
def test_a_model_is_torchvision_s_network_and_the_classifier_of_its_features(name: str) -> None:
    model = build(name)
    torch.manual_seed(0)
    network = get_model(name, weights=None, num_classes=10).eval()
    images = torch.rand(2, *RGB)
    with torch.no_grad():
        assert torch.equal(model(images), network(images))
        features = model.features(images)
        assert features.ndim == 2
        assert torch.equal(model(images), model.classifier(features))


# A RegNet computes its widths with tensors, which have no values on the meta device.
ON_META = [n for n in list_models(module=torchvision_models) if not n.startswith("regnet")]


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_META)
def test_every_classification_model_of_torchvision_has_a_head_but_squeezenet(name: str) -> None:
    size = 299 if name == "inception_v3" else 224
    with torch.device("meta"):
        if name.startswith("squeezenet"):
            with pytest.raises(Exception, match="no linear layer"):
                build(name, (3, size, size))
            return
        model = build(name, (3, size, size)).train()
        images = torch.empty(2, 3, size, size)
        assert model(images).shape == (2, 10)
        assert model.features(images).shape == (2, model.classifier.in_features)


def test_given_weights_are_loaded_but_for_the_head_and_a_replaced_stem(tmp_path: Path) -> None:
    network = published("resnet18")
    torch.save({"state_dict": network.state_dict()}, tmp_path / "resnet18.pt")
    wanted = network.state_dict()
    for changes in ({}, {"image_shape": GRAY}, {"small_images": True}):
        settings: dict[str, Any] = {"weights": str(tmp_path / "resnet18.pt"), **changes}
        model = build("resnet18", **settings)
        own_stem = model.network.conv1.weight.detach().clone()
        head = model.classifier.weight.detach().clone()
        model.load_initial_weights(download=False)
        for name, tensor in model.network.state_dict().items():
            if name != "conv1.weight":
                assert torch.equal(tensor, wanted[name]), name
        stem = wanted["conv1.weight"]
        expected = {"": stem, "image_shape": stem.sum(1, keepdim=True), "small_images": own_stem}
        assert torch.equal(model.network.conv1.weight, expected["".join(changes)])
        assert torch.equal(model.classifier.weight, head)


@pytest.mark.slow
def test_resnet18_is_fine_tuned_from_a_file_and_evaluated_without_it(tmp_path: Path) -> None:
    file = tmp_path / "resnet18.pt"
    torch.save(published("resnet18").state_dict(), file)
    line = [*SMALL, "model=torchvision", f"model.weights={file}", f"output_dir={tmp_path / 'out'}"]
    line += ["split.validation=1300", "training.epochs=1", "training.frozen_epochs=1"]
    assert train.main([*line, "optimizer=sgd"]) == 0
    (run,) = find_runs(tmp_path / "out")
    config, wanted = run.read_config(), torch.load(file, weights_only=True)
    assert config.model["weights_sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert config.dataset.mean == pytest.approx([(0.485 + 0.456 + 0.406) / 3])
    assert config.dataset.std == pytest.approx([(0.229 + 0.224 + 0.225) / 3])
    trained = torch.load(run.last, weights_only=True)["model"]
    name = "layer1.0.conv1.weight"
    assert torch.equal(trained[f"network.{name}"], wanted[name]), f"{name} was frozen"
    assert (trained["classifier.weight"] != 0).any()
    file.unlink()
    score = run.read_summary().test_accuracy
    assert evaluate.main([str(run.path)]) == 0
    assert RunDir(run.path).read_summary().test_accuracy == score


def test_the_statistics_of_the_weights_are_those_of_the_images_unless_said(weights: Path) -> None:
    given = f"model.weights={weights}"
    kept = one(*SHUFFLENET, given, "model.normalisation=dataset")
    assert kept.dataset == one(*SHUFFLENET).dataset != one(*SHUFFLENET, given).dataset


def test_a_run_is_not_resumed_with_another_file_in_place_of_its_weights(
    weights: Path, tmp_path: Path, capfd: Capture
) -> None:
    config = one(*SHUFFLENET, f"model.weights={weights}", f"output_dir={tmp_path / 'out'}")
    run = RunDir.create(config)
    torch.save(published("shufflenet_v2_x1_0").state_dict(), weights)
    assert train.main([str(run.path)]) == 2
    assert "model.weights_sha256=null for another run" in the_line(capfd)
    assert run.read_summary().status == "queued"


@pytest.mark.parametrize("answer", ["weights", "changed"])
def test_published_weights_come_through_torchvision_from_their_server(
    answer: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    network = published("shufflenet_v2_x0_5")
    torch.save(network.state_dict(), tmp_path / "served.pt")
    content = (tmp_path / "served.pt").read_bytes()
    name = f"shufflenet-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    entry = torchvision_models.ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    with file_server() as server:
        served = content[:-1] + b"?" if answer == "changed" else content
        url = server.serve(f"/{name}", Behaviour(served))
        monkeypatch.setattr(entry.value, "url", url)
        config = one(*SHUFFLENET, "model.weights=DEFAULT")
        assert config.model["weights"] == "IMAGENET1K_V1"
        assert server.requests == [], "nothing is downloaded before a run starts"
        model = build("shufflenet_v2_x0_5", weights=config.model["weights"])
        if answer == "weights":
            model.load_initial_weights(download=True)
            expected = network.state_dict()
            assert all(torch.equal(t, expected[k]) for k, t in model.network.state_dict().items())
        else:
            with pytest.raises(Unavailable, match="cannot be fetched from http://127"):
                model.load_initial_weights(download=True)


TORCHVISION: list[tuple[str, str]] = [
    ("model.architecture=resnet81", "the nearest are resnet18"),
    ("model.architecture=squeezenet1_0", "it has no linear layer"),
    ("model.architecture=vit_b_32 model.weights=DEFAULT", "Expected 224 but got 32"),
    ("model.architecture=alexnet model.small_images=true", "as the ResNets have"),
    ("model.weights=nowhere.pt", "null, IMAGENET1K_V1, DEFAULT or a file"),
    ("model.weights=garbage.pt", "model.weights=garbage.pt cannot be read: it is damaged, or no"),
    ("model.weights=shufflenet.pt", "not the weights of resnet18: Error(s) in loading"),
    ("model.weights=DEFAULT dataset.mean=[0.5]", "add model.normalisation=dataset"),
    ("activation=gelu", "activation was asked for, but model torchvision does not use it"),
    ("optimizer.backbone_lr=-1", "optimizer.backbone_lr=-1 is wrong: it must be at least 0"),
    ("optimizer.backbone_lr=1e-4 scheduler=one_cycle", "one rate for all parameters"),
    ("training.frozen_epochs=-1", "training.frozen_epochs=-1 is wrong"),
]
TIMM = [
    ("model.architecture=resnt18d", "the nearest are resnet18d"),
    ("model.architecture=resnet18d.none", "the nearest are resnet18d."),
    ("model.architecture=deit_tiny_distilled_patch16_224", "it has several heads, or none"),
    ("model.architecture=vit_tiny_patch16_224", "model cannot take images of"),
    ("model.pretrained=true model.weights=nowhere.pt", "set one of them"),
    ("model.weights=shufflenet.pt", "not the weights of resnet18d"),
]


@pytest.mark.parametrize(
    ("model", "line", "words"),
    [*(("torchvision", *case) for case in TORCHVISION), *(("timm", *case) for case in TIMM)],
)
def test_a_wrong_request_is_one_line_and_nothing_is_written(
    model: str, line: str, words: str, weights: Path, monkeypatch: Patch, capfd: Capture
) -> None:
    if model == "timm":
        pytest.importorskip("timm")
    monkeypatch.chdir(weights.parent)
    Path("garbage.pt").write_bytes(b"these are no weights")
    before = sorted(weights.parent.rglob("*"))
    assert train.main(["dataset=digits", "device=cpu", f"model={model}", *line.split()]) == 2
    assert words in the_line(capfd)
    assert sorted(weights.parent.rglob("*")) == before


def the_line(capfd: Capture) -> str:
    """The one line that a command wrote to standard error."""
    (line,) = capfd.readouterr().err.splitlines()
    return line


FEW = "split.validation=1300"  # leaves three batches of training images


def short(folder: Path, *overrides: str) -> RunDir:
    return train_tiny(folder, FEW, *overrides)


def parts(run: RunDir) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A run's last weights and buffers: those of the features, those of the classifier."""
    state = torch.load(run.last, weights_only=True)["model"]
    features = {k: v for k, v in state.items() if k.startswith("features.")}
    return features, {k: v for k, v in state.items() if k.startswith("classifier.")}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a.keys() | b.keys())


def test_frozen_epochs_change_the_classifier_alone_and_later_ones_everything(
    tmp_path: Path,
) -> None:
    start = parts(short(tmp_path, "training.epochs=0"))
    frozen = parts(short(tmp_path, "training.epochs=1", "training.frozen_epochs=1"))
    assert equal(frozen[0], start[0])
    assert not equal(frozen[1], start[1])
    longer = parts(short(tmp_path, "training.epochs=2", "training.frozen_epochs=1"))
    assert not any(
        torch.equal(longer[0][k], v) for k, v in start[0].items() if k.endswith("weight")
    )


def test_backbone_lr_is_the_rate_of_all_but_the_classifier(tmp_path: Path) -> None:
    start = parts(short(tmp_path, "training.epochs=0", "optimizer=sgd_plain"))
    line = ["training.epochs=1", "optimizer=sgd_plain", "optimizer.lr=0.01"]
    run = short(tmp_path, *line, "optimizer.backbone_lr=0")
    features, classifier = parts(run)
    assert all(torch.equal(features[k], v) for k, v in start[0].items() if k.endswith("weight"))
    assert not equal(classifier, start[1])
    rates = {group["lr"] for group in torch.load(run.last)["optimizer"]["param_groups"]}
    assert rates == {0.01, 0.0}
    assert [row.learning_rate for row in run.read_metrics()] == [0.01]


def test_timm_is_named_where_it_is_missing(monkeypatch: Patch, capfd: Capture) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    assert train.main(["dataset=digits", "model=timm"]) == 2
    assert "model=timm needs timm: pip install 'cifar-lab[timm]'" in the_line(capfd)


@pytest.fixture
def timm() -> Any:
    return pytest.importorskip("timm")


@pytest.mark.parametrize("name", ["resnet18d", "convnext_atto"])
def test_a_model_is_timm_s_network_and_the_classifier_of_its_features(timm: Any, name: str) -> None:
    from cifar_lab.models.zoo_timm import TimmModel

    torch.manual_seed(0)
    model: Any = TimmModel(RGB, 10, architecture=name).eval()
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=10).eval()
    images = torch.rand(2, *RGB)
    with torch.no_grad():
        assert torch.equal(model(images), network(images))
        assert model.features(images).shape == (2, model.classifier.in_features)


def test_timm_s_published_weights_are_named_by_their_tag(timm: Any, monkeypatch: Patch) -> None:
    config = one("model=timm", "model.pretrained=true")
    assert config.model["architecture"] == "resnet18d.ra2_in1k"
    assert config.dataset.mean == pytest.approx([(0.485 + 0.456 + 0.406) / 3])
    again = one("model=timm", "model.pretrained=true", "model.architecture=resnet18d.ra2_in1k")
    assert address(again) == address(config)


# --- model.weights=FILE ---------------------------------------------------------------------------


def test_a_model_of_ones_own_starts_from_a_file(tiny_finished: RunDir, tmp_path: Path) -> None:
    file = Path(shutil.copy(tiny_finished.best, tmp_path / "mine.pt"))
    run = train_tiny(tmp_path, f"model.weights={file}", "training.epochs=0")
    given, loaded = (load_checkpoint(path)["model"] for path in (file, run.last))
    assert all(torch.equal(loaded[name], tensor) for name, tensor in given.items())
    config = run.read_config()
    assert len(config.model["weights_sha256"]) == 64
    shutil.move(file, tmp_path / "other.pt")
    again = config_of(f"model.weights={tmp_path / 'other.pt'}", "training.epochs=0")
    assert address(again).name == run.path.name  # the content counts, not the place
    assert address(config_of("training.epochs=0")).name != run.path.name
    assert config_of("model.weights=null").model == config_of().model
    deflate(tmp_path / "other.pt")
    with pytest.raises(UsageError, match=r"other\.pt cannot be read: its entries are compressed"):
        config_of(f"model.weights={tmp_path / 'other.pt'}")


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
