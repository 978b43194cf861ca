"""The models as their YAML builds them: counts, shapes, parts, and what they refuse."""

import functools
import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

CONF = Path(__file__).parents[1] / "conf"
CIFAR, MNIST, MNIST_PADDED = (3, 32, 32), (1, 28, 28), (1, 32, 32)
MODELS = sorted(path.stem for path in (CONF / "model").glob("*.yaml"))
if importlib.util.find_spec("timm") is None:
    MODELS.remove("timm")
ACTIVATIONS = sorted(path.stem for path in (CONF / "activation").glob("*.yaml"))


def options(group: str, name: str) -> dict[str, Any]:
    container = OmegaConf.to_container(OmegaConf.load(CONF / group / f"{name}.yaml"))
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def locate(target: str) -> Callable[..., Any]:
    module, _, name = target.rpartition(".")
    located: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return located


def build(
    model: str,
    image_shape: tuple[int, int, int] = CIFAR,
    device: str = "meta",
    activation: Callable[[], nn.Module] = nn.ReLU,
    conv_dropout: float = 0.25,
    dense_dropout: float = 0.5,
    **changes: Any,
) -> nn.Module:
    """A model of 10 classes with its YAML's options and these changes."""
    settings = {**options("model", model), **changes}
    constructor = locate(settings.pop("_target_"))
    injected = {
        "image_shape": image_shape,
        "num_classes": 10,
        "activation": activation,
        "conv_dropout": conv_dropout,
        "dense_dropout": dense_dropout,
    }
    accepted = inspect.signature(constructor).parameters
    with torch.device(device):
        built = constructor(**{k: v for k, v in injected.items() if k in accepted}, **settings)
    assert isinstance(built, nn.Module)
    return built


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def multiply_adds(model: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """Multiply-adds of the convolutions and linear layers for one image."""
    total = 0

    def count(module: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        assert isinstance(module, nn.Conv2d | nn.Linear)
        total += output[0].numel() * module.weight[0].numel()

    counted = (m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    hooks = [module.register_forward_hook(count) for module in counted]
    model(torch.empty(2, *image_shape, device=next(model.parameters()).device))
    for hook in hooks:
        hook.remove()
    return total


# Model, image shape, changed options, parameters, multiply-adds. The multiply-adds of the
# alternatives of mixed_kernel are known in millions.
TABLE: list[tuple[str, tuple[int, int, int], dict[str, Any], int, float]] = [
    ("convnet", CIFAR, {}, 2_169_770, 26_579_968),
    ("convnet", MNIST, {}, 1_677_674, 19_899_904),
    ("convnet", MNIST_PADDED, {}, 2_169_194, 25_990_144),
    ("convnet_plain", CIFAR, {}, 890_410, 15_167_872),
    ("convnet_deep", CIFAR, {}, 1_702_186, 53_318_656),
    ("two_branch", CIFAR, {}, 47_970, 752_646),
    ("two_branch", CIFAR, {"reading": "R2"}, 47_970, 752_646),
    ("two_branch", CIFAR, {"reading": "R3"}, 95_020, 799_686),
    ("two_branch", CIFAR, {"reading": "R4"}, 54_108, 758_784),
    ("two_branch", CIFAR, {"reading": "R5"}, 101_158, 805_824),
    ("mixed_kernel", CIFAR, {}, 4_491_749, 484_019_337),
    ("mixed_kernel", CIFAR, {"batch_norm_per_conv": True}, 4_495_333, 484.0),
    ("mixed_kernel", CIFAR, {"gate_reduction": 4}, 4_517_091, 484.0),
    ("mixed_kernel", CIFAR, {"gate": "sigmoid"}, 4_491_749, 484_019_337),
    ("mixed_kernel", CIFAR, {"global_pool": False}, 4_983_269, 484.5),
    ("mixed_kernel", CIFAR, {"hidden": 64}, 4_474_533, 484.0),
    ("mixed_kernel", CIFAR, {"kernels": [3, 5, 7]}, 10_595_813, 1_147.8),
    ("mixed_kernel", CIFAR, {"widths": [64] * 6}, 736_293, 238.6),
    ("mixed_kernel", CIFAR, {"widths": [64, 128, 256, 256, 512, 512]}, 17_576_165, 1_621.8),
    ("mixed_kernel_small", CIFAR, {}, 290_933, 31.5),
    # Not of the reports. ResNet-18: 11,173,962 is what public CIFAR implementations count too.
    ("resnet", CIFAR, {}, 11_173_962, 555.4),
    # ResNet-20: He et al. 2015, 4.2, say 0.27 M; the projections (1x1) instead of zeros add some.
    ("resnet_small", CIFAR, {}, 272_474, 40.8),
    # By hand from the script of airbench94, less the 24 biases of its first convolution.
    ("airbench", CIFAR, {}, 1_971_616, 118.1),
    ("airbench_small", CIFAR, {}, 497_504, 33.1),
]


@pytest.mark.parametrize(("model", "image_shape", "changes", "count", "macs"), TABLE)
def test_parameters_and_multiply_adds_are_the_reports(
    model: str, image_shape: tuple[int, int, int], changes: dict[str, Any], count: int, macs: float
) -> None:
    built = build(model, image_shape, **changes)
    assert parameters(built) == count
    measured = multiply_adds(built, image_shape)
    assert measured == macs if isinstance(macs, int) else round(measured / 1e6, 1) == macs


@pytest.mark.parametrize("image_shape", [MNIST, (3, 40, 36)])
@pytest.mark.parametrize("model", MODELS)
def test_every_model_takes_every_dataset_s_shape(
    model: str, image_shape: tuple[int, int, int]
) -> None:
    logits = build(model, image_shape)(torch.empty(2, *image_shape, device="meta"))
    assert logits.shape == (2, 10)


ALTERNATIVES: list[tuple[str, dict[str, Any]]] = [
    *((model, {}) for model in MODELS),
    *(("two_branch", {"reading": f"R{number}", "gate": "softmax"}) for number in range(1, 6)),
    ("mixed_kernel_small", {"global_pool": False, "gate_reduction": 4}),
    ("mixed_kernel_small", {"batch_norm_per_conv": True, "softmax_output": True}),
    ("mixed_kernel_small", {"gate": "sigmoid"}),
]


@pytest.mark.parametrize(("model", "changes"), ALTERNATIVES)
def test_forward_is_the_classifier_of_the_features_and_trains_every_parameter(
    model: str, changes: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    built: Any = build(model, device="cpu", activation=nn.Tanh, **changes).eval()
    images = torch.rand(8, *CIFAR)
    with torch.no_grad():
        logits = built(images[:2])
        assert torch.equal(logits, built.classifier(built.features(images[:2])))
        built.to(memory_format=torch.channels_last)
        strided = built(images[:2].to(memory_format=torch.channels_last))
    assert torch.allclose(logits, strided, atol=1e-5)
    if model == "timm":  # its residual branches start at zero, with the last batch norm's weight
        for module in built.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.ones_(module.weight)
    loss = nn.functional.cross_entropy(built.train()(images), torch.arange(8))
    named = [(n, p) for n, p in built.named_parameters() if p.requires_grad]
    names, values = zip(*named, strict=True)
    for name, gradient in zip(names, torch.autograd.grad(loss, values), strict=True):
        assert gradient.isfinite().all(), name
        # The bias of a layer that batch norm follows cancels: its gradient is rounding only.
        assert gradient.any() or name.endswith("bias"), name


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_each_place_gets_an_activation_of_its_own(activation: str) -> None:
    settings = options("activation", activation)
    kind = locate(settings.pop("_target_"))
    for model, places in (("convnet", 5), ("convnet_deep", 9), ("two_branch", 1)):
        built = build(model, activation=lambda: kind(**settings))
        found = [module for module in built.modules() if type(module) is kind]
        assert len(found) == len({id(module) for module in found}) == places


@pytest.mark.parametrize(
    ("model", "probabilities"),
    [
        ("convnet", [0.25, 0.25, 0.5]),
        ("convnet_plain", [0.25, 0.25, 0.5]),
        ("convnet_deep", [0.25, 0.25, 0.25, 0.25, 0.5]),
        ("mixed_kernel", [0.25, 0.25, 0.25, 0.5]),
        ("two_branch", []),
    ],
)
def test_dropout_follows_each_pooling_and_the_hidden_layer(
    model: str, probabilities: list[float]
) -> None:
    built = build(model)
    assert [m.p for m in built.modules() if type(m) is nn.Dropout] == probabilities
    order = [type(m) for m in built.modules() if isinstance(m, nn.MaxPool2d | nn.Dropout)]
    poolings = probabilities.count(0.25)
    assert order == [nn.MaxPool2d, nn.Dropout] * poolings + [nn.Dropout] * bool(probabilities)


def test_old_checkpoints_of_convnet_stay_loadable() -> None:
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    assert list(build("convnet").state_dict()) == [
        *("features.conv1.weight", "features.conv1.bias", *(f"features.bn1.{k}" for k in norm)),
        *("features.conv2.weight", "features.conv2.bias", *(f"features.bn2.{k}" for k in norm)),
        *("features.conv3.weight", "features.conv3.bias", *(f"features.bn3.{k}" for k in norm)),
        *("features.conv4.weight", "features.conv4.bias", *(f"features.bn4.{k}" for k in norm)),
        *("classifier.fc1.weight", "classifier.fc1.bias", *(f"classifier.bn5.{k}" for k in norm)),
        *("classifier.fc2.weight", "classifier.fc2.bias"),
    ]


@pytest.mark.parametrize(
    ("model", "activation"),
    [("convnet", "relu"), ("mixed_kernel_small", "silu"), ("resnet_small", "leaky_relu")],
)
def test_an_activation_in_place_changes_nothing_that_another_layer_needs(
    model: str, activation: str
) -> None:
    settings = options("activation", activation)
    kind = locate(settings.pop("_target_"))
    gradients = []
    for inplace in (False, True):
        torch.manual_seed(0)
        built = build(
            *(model, CIFAR, "cpu"),
            activation=functools.partial(kind, **settings | {"inplace": inplace}),
            conv_dropout=0.0,
            dense_dropout=0.0,
        )
        loss = nn.functional.cross_entropy(built(torch.rand(4, *CIFAR)), torch.arange(4))
        gradients.append(torch.autograd.grad(loss, trained(built)))
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("model", "image_shape", "changes", "message"),
    [
        ("convnet", CIFAR, {"kernel_size": 33}, "33x33 kernel .* 32x32 image .* convolution 1"),
        ("convnet_deep", (1, 8, 8), {}, "2x2 pooling kernel .* 1x1 image .* pooling 4 of 4"),
        ("convnet", CIFAR, {"padding": "some"}, "padding"),
        ("resnet", CIFAR, {"blocks": []}, "blocks needs an entry"),
        ("two_branch", CIFAR, {"width": 0}, "at least 1"),
        ("mixed_kernel", CIFAR, {"gate_reduction": 0}, "gate_reduction null or at least 1"),
        ("two_branch", (3, 4, 32), {}, "5x5 kernel .* 4x32 image"),
        ("two_branch", CIFAR, {"reading": "R6"}, "reading=R6 .* R1, R2, R3, R4, R5"),
        ("two_branch", CIFAR, {"gate": "tanh"}, "gate=tanh .* identity, relu, sigmoid, softmax"),
        ("mixed_kernel", CIFAR, {"kernels": [1, 2]}, "2x2 kernel .* odd"),
        ("mixed_kernel", CIFAR, {"pool_after": [7]}, "pool_after=7 .* blocks 1 to 6"),
        ("airbench", CIFAR, {"widths": [64, 256]}, "three numbers"),
        ("airbench", (3, 15, 32), {}, "at least 16x16"),
        ("mixed_kernel", (3, 6, 6), {}, "2x2 pooling kernel .* 1x1 image after block 5"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    model: str, image_shape: tuple[int, int, int], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        build(model, image_shape, **changes)
    assert "\n" not in str(caught.value)


def test_a_gate_multiplies_its_own_convolution_and_softmax_makes_shares_of_them() -> None:
    torch.manual_seed(0)
    built: Any = build("mixed_kernel_small", device="cpu").eval()
    block, images = built.blocks.block1, torch.rand(3, *CIFAR)
    with torch.no_grad():
        gates = block.gate(images)
        expected = sum(
            gates[:, index, None, None, None] * conv(images)
            for index, conv in enumerate(block.convs)
        )
        assert torch.allclose(block(images), block.activation(block.bn(expected)), atol=1e-6)
        for model, blocks, kernels in (("two_branch", 1, 2), ("mixed_kernel_small", 6, 3)):
            shared: Any = build(model, device="cpu", gate="softmax").eval()
            shares = shared.gates(images)
            assert [gate.shape for gate in shares] == [(3, kernels)] * blocks
            assert all(torch.allclose(gate.sum(1), torch.ones(3)) for gate in shares)


def test_two_branch_readings_are_the_formulas_of_the_report() -> None:
    images = torch.rand(3, *CIFAR)
    for reading in ("R1", "R2", "R3", "R4", "R5"):
        torch.manual_seed(0)
        built: Any = build("two_branch", device="cpu", reading=reading)
        gate_input = images.mean((2, 3)) if reading in ("R1", "R2", "R3") else images.flatten(1)
        a1, a2 = built.gate.mlp(gate_input).T[:, :, None, None, None]
        first, second = a1 * built.conv1(images), a2 * built.conv2(images)
        if reading in ("R1", "R4"):
            expected = built.heads[0]((first + second).relu().flatten(1))
        elif reading == "R2":
            expected = built.heads[0]((first.relu() + second.relu()).flatten(1))
        else:
            expected = built.heads[0](first.relu().flatten(1))
            expected = expected + built.heads[1](second.relu().flatten(1))
        assert torch.allclose(built(images), expected, atol=1e-5), reading


def trainable(group: str) -> list[str]:
    names = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
    return [name for name in names if options(group, name)["_target_"] is not None]


@pytest.mark.parametrize("name", trainable("optimizer"))
def test_optimizer_yaml_has_every_argument_of_torch_and_steps(name: str) -> None:
    settings = options("optimizer", name)
    constructor = locate(settings.pop("_target_"))
    # of cifar_lab: a rate for all but the classifier; Muon divides the parameters itself
    assert settings.pop("backbone_lr", "none") == ("none" if name == "muon" else None)
    known = dict(inspect.signature(constructor).parameters)
    assert set(settings) == set(known) - {"params"}
    defaults = {k: list(p.default) if k == "betas" else p.default for k, p in known.items()}
    changed = {key: value for key, value in settings.items() if value != defaults[key]}
    departures = {"lr": 1e-2, "momentum": 0.9, "weight_decay": 5e-4} if name == "sgd" else {}
    assert changed == departures
    layer = nn.Linear(2, 1)
    before = layer.weight.detach().clone()
    optimizer = constructor(layer.parameters(), **settings)
    torch.autograd.backward(layer(torch.ones(3, 2)).sum())
    optimizer.step()
    assert not torch.equal(layer.weight, before)


@pytest.mark.parametrize("name", trainable("scheduler"))
def test_scheduler_yaml_binds_to_torch_and_steps(name: str) -> None:
    settings = options("scheduler", name)
    constructor = locate(settings.pop("_target_"))
    step, monitor = settings.pop("step"), settings.pop("monitor", None)
    known = set(inspect.signature(constructor).parameters)
    # The state of a schedule and a second way to say total_steps are no settings.
    assert set(settings) == known - {"optimizer", "last_epoch", "epochs", "steps_per_epoch"}
    assert step in ("epoch", "batch")
    if settings.get("max_lr") == "${optimizer.lr}":
        settings["max_lr"] = 0.1
    for whole_run in ("T_max", "total_steps", "total_iters"):
        if whole_run in settings:
            assert settings[whole_run] is None
            settings[whole_run] = 10
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9)
    scheduler = constructor(optimizer, **settings)
    for _ in range(10 - ("total_steps" in settings)):
        optimizer.step()
        scheduler.step(*([0.5] if monitor else []))
    # One reduction after patience + 1 = 4 epochs without improvement, and one more 4 later.
    last = {"one_cycle": 0.1 / 25 / 1e4, "reduce_on_plateau": 0.1 * 0.1**2}.get(name, 0.0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(last, abs=1e-12)
    assert optimizer.param_groups[0]["momentum"] == 0.9
    assert monitor == ("val_accuracy" if name == "reduce_on_plateau" else None)
