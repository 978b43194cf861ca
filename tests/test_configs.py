"""Every shipped YAML composes, binds to its target's signature, and runs small."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from cifar_lab.config.run_config import parse, to_plain
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.training.preflight import compose_checked
from cifar_lab.training.run import run_experiment

CONF = Path(__file__).resolve().parent.parent / "conf"
FILES = sorted(p.relative_to(CONF) for p in CONF.rglob("*.yaml") if p.parent.name != "report")
if importlib.util.find_spec("timm") is None:
    FILES.remove(Path("model", "timm.yaml"))
GROUPS = {
    str(group): sorted(path.stem for path in FILES if path.parent == group)
    for group in {path.parent for path in FILES if path.parent != Path()}
}
# groups whose options run here on a few random images
RUN_GROUPS = ("model", "optimizer", "activation", "dropout", "scheduler", "augmentation", "figures")
WITHOUT_ACTIVATION = {"torchvision", "timm"}
WITHOUT_DROPOUT = {
    *("two_branch", "resnet", "resnet_small", "airbench", "airbench_small"),
    *WITHOUT_ACTIVATION,
}


# The other experiments and models are slow.
EXPERIMENTS = ("none", "smoke", "s2_plateau", "s3_learning_rate")


def is_slow(file: Path) -> bool:
    group, option = file.parent.name, file.stem
    quick = {"experiment": EXPERIMENTS, "model": ("convnet", "two_branch", "airbench_small")}
    return group in quick and option not in quick[group]


@pytest.mark.parametrize(
    "file",
    [
        pytest.param(path, marks=[pytest.mark.slow] if is_slow(path) else [])
        for path in FILES
        if path.parent != Path()
    ],
    ids=str,
)
def test_yaml_composes_and_binds(file: Path) -> None:
    group, option = file.parent.as_posix(), file.stem
    overrides = [f"{group}={option}", "device=cpu"]
    if group == "model" and option in WITHOUT_DROPOUT:
        overrides.append("dropout=none")
    if option == "image_folder":  # its statistics are those of the pictures, which must be there
        overrides += ["dataset.mean=null", "dataset.std=null"]
    request = compose_checked(overrides)
    assert request.runs
    for cell in request.runs:
        assert parse(to_plain(cell.config)) == cell.config
        if group in (*RUN_GROUPS, "dataset", "experiment"):
            assert cell.config.choices[group] == option


@pytest.fixture(scope="module")
def arrays(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write 40 random images of 10 classes in two shapes."""
    folder = tmp_path_factory.mktemp("arrays")
    random = np.random.default_rng(0)
    for channels, side in ((3, 32), (1, 28)):
        images = random.integers(0, 256, (40, channels, side, side), dtype=np.uint8)
        np.savez(folder / f"{channels}.npz", images=images, labels=np.arange(40) % 10)
    return folder


def tiny(arrays: Path, output_dir: Path, channels: int, side: int) -> list[str]:
    """Return what turns any request into seconds of work on random images."""
    return [
        *("dataset=npz", f"dataset.source.path={arrays / f'{channels}.npz'}", "device=cpu"),
        *(f"dataset.image_shape=[{channels},{side},{side}]", "split.validation=0.3"),
        *("training.epochs=1", "training.batch_size=8", f"output_dir={output_dir}"),
    ]


LENGTH = max(len(GROUPS[group]) for group in RUN_GROUPS)


def option_of(group: str, turn: int) -> str:
    options = GROUPS[group]
    if group == "figures" and turn >= len(options):
        return "none"  # drawing takes longer than training: once each
    if group == "figures":
        turn += 2  # none where the fast tier has its turn
    return options[turn % len(options)]


@pytest.mark.parametrize(
    "turn", [pytest.param(t, marks=[] if t == 2 else [pytest.mark.slow]) for t in range(LENGTH)]
)
def test_options_run_small(turn: int, arrays: Path, tmp_path: Path) -> None:
    # one run takes the next option of each group: as many runs as the largest group has options
    chosen = {group: option_of(group, turn) for group in RUN_GROUPS}
    if chosen["model"] in WITHOUT_DROPOUT:
        chosen["dropout"] = "none"
    if chosen["model"] in WITHOUT_ACTIVATION:
        del chosen["activation"]
    overrides = [f"{group}={option}" for group, option in chosen.items()]
    if chosen["figures"] == "embeddings":
        overrides.append("figures.tsne.perplexity=5")
    shape = (3, 32)
    (cell,) = compose_checked([*overrides, *tiny(arrays, tmp_path, *shape)]).runs
    run = RunDir.create(cell.config)
    summary = run_experiment(run)
    assert summary.status == "finished"
    assert summary.test_size == 8
    assert not [warning for warning in summary.warnings if "was not drawn" in warning]
    drawn = {path.stem for path in run.path.glob("figures/*.png")}
    assert drawn == {name for name, figure in cell.config.figures.items() if figure}


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["sound", "report"])
@pytest.mark.parametrize("experiment", [e for e in GROUPS["experiment"] if e != "none"])
def test_experiment_runs_small(
    experiment: str, protocol: str, arrays: Path, tmp_path: Path
) -> None:
    channels, side = (1, 28) if experiment.startswith("s2") else (3, 32)
    asked = [f"experiment={experiment}", f"protocol={protocol}", "figures=none"]
    statistics = [f"dataset.mean={[0.5] * channels}", f"dataset.std={[0.5] * channels}"]
    small = tiny(arrays, tmp_path, channels, side)
    cell = compose_checked([*asked, *statistics, *small]).runs[0]
    summary = run_experiment(RunDir.create(cell.config))
    assert summary.status == "finished"
    assert summary.protocol == protocol
    assert summary.test_accuracy is not None
