"""Wrong requests: one line that names the key and what is right, exit code 2, nothing written."""

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cifar_lab import evaluate, train
from cifar_lab.config.compose import compose
from cifar_lab.config.identity import address
from cifar_lab.config.run_config import dump, flatten, load, to_plain
from cifar_lab.errors import UsageError
from cifar_lab.training.preflight import compose_checked

# (the line, what its one line of answer must contain)
WRONG: list[tuple[list[str], str]] = [
    # keys
    (["+typo=1"], "typo"),
    (["++a.b=1"], "there is no setting a;"),
    (["typo=1"], "typo"),
    (["optimizer.lrr=1"], "optimizer.lrr (did you mean lr?)"),
    (["trainig.epochs=1"], "trainig"),
    (["training.tensorboard=true"], "write tracker=tensorboard"),
    (["training.epoch=1"], "training.epoch (did you mean epochs?)"),
    (["dataset.nope=3"], "dataset.nope"),
    (["optimizer.params=3"], "optimizer.params"),
    (["seed.x=1"], "seed.x"),
    # options of groups
    (["model=convnett"], "model=convnett is wrong"),
    (["model=convnett"], "did you mean convnet"),
    (["model=null"], "model=null is wrong"),
    (["model=[convnet,two_branch]"], "model=[convnet,two_branch] is wrong"),
    (["model="], "model= is wrong"),
    (["~model"], "~model is wrong"),
    (["~optimizer.lr"], "~optimizer.lr is wrong"),
    (["dataset=../model/convnet"], "dataset=../model/convnet is wrong"),
    (["dataset=/etc/passwd"], "dataset=/etc/passwd is wrong"),
    (["experiment=nope"], "experiment=nope is wrong"),
    (["model@x=convnet"], "packages (@) are not supported"),
    (["model=convnet,two_branch"], "add -m"),
    # values: types
    (["optimizer.lr=abc"], "optimizer.lr=abc is wrong"),
    (["optimizer.lr=null"], "optimizer.lr"),
    (["training.epochs=abc"], "training.epochs=abc is wrong: it must be a whole number"),
    (["training.epochs=true"], "training.epochs"),
    (["training=3"], "training"),
    (["augmentation.horizontal_flip=1"], "augmentation.horizontal_flip=1 is wrong"),
    (["seed=null"], "seed"),
    (["model.widths=3"], "model.widths"),
    (["deterministic=maybe"], "deterministic=maybe is wrong: it must be true or false"),
    (["name=3"], "name=3 is wrong: it must be text"),
    (["jobs=0"], "jobs"),
    # values: ranges
    (["optimizer.lr=nan"], "optimizer.lr"),
    (["optimizer.lr=inf"], "optimizer.lr"),
    (["optimizer.lr=-1"], "optimizer"),
    (["optimizer.betas=[2,3]"], "optimizer"),
    (["dropout.conv=1.5"], "dropout.conv=1.5 is wrong: it must be at least 0 and less than 1"),
    (["dropout.dense=nan"], "dropout.dense"),
    (["training.epochs=-1"], "training.epochs=-1 is wrong: it must be at least 0"),
    (["training.epochs=1e30"], "training.epochs"),
    (["training.batch_size=0"], "training.batch_size=0 is wrong: it must be at least 1"),
    (["training.batch_size=1"], "training.batch_size=1 is wrong"),
    (["training.class_weights=[1,2]"], "it must be balanced or 10 numbers above 0, one per class"),
    (["training.class_weights=[0,1,1,1,1,1,1,1,1,1]"], "balanced or numbers above 0"),
    (["training.class_weights=balance"], "training.class_weights=balance is wrong"),
    (["training.ema=1"], "training.ema=1.0 is wrong: it must be more than 0 and less than 1"),
    (["evaluation.scored_weights=averaged"], "best or last without training.ema"),
    (["training.ema=0.9", "training.compile=true"], "it must be false with training.ema"),
    (["training.clip_grad_norm=0"], "training.clip_grad_norm=0.0 is wrong: it must be more than 0"),
    (["training.monitor=val_macro"], "did you mean val_macro_f1"),
    (["training.monitor=val_loss", "split.validation=0"], "training.monitor=val_loss is wrong"),
    (["seed=" + "9" * 5000], "seed="),
    (["threads=100000"], "threads=100000 is wrong"),
    (["augmentation.cutout=33"], "augmentation.cutout=33 is wrong: it must be at most the image's"),
    (["augmentation.erasing=1.5"], "augmentation.erasing=1.5 is wrong: it must be at least 0"),
    (["augmentation=mixupp"], "did you mean mixup"),
    (["split.validation=2000"], "split.validation=2000"),
    (["split.validation=1.5"], "split.validation=1.5"),
    (["split.method=strat"], "did you mean stratified"),
    (["split.validation=0", "training.patience=1"], "training.patience"),
    (["precision=fp8"], "precision=fp8 is wrong: it must be one of auto, fp32, bf16, fp16"),
    (["precision=fp16", "device=cpu"], "precision=fp16"),
    (["protocol=loud"], "did you mean sound"),
    # values that do not fit together
    (["model.kernel_size=99"], "model"),
    (["model=two_branch", "dropout=standard"], "dropout"),
    (["scheduler=reduce_on_plateau", "split.validation=0"], "split.validation is 0"),
    (["scheduler=reduce_on_plateau", "scheduler.monitor=test_loss"], "test set"),
    (["scheduler=reduce_on_plateau", "scheduler.monitor=val_macro_f1"], "must be one of"),
    (["scheduler=cosine", "scheduler.step=never"], "scheduler.step=never is wrong"),
    (["dataset.image_shape=[3,8]"], "dataset.image_shape"),
    (["dataset.std=[0]"], "dataset.std"),
    (["dataset.mean=[0,0,0]"], "dataset.mean"),
    # interpolations
    (["seed=${nope}"], "nope"),
    (["seed=${seed}"], "interpolation"),
    (["name=${oc.env:SURELY_NOT_SET}"], "SURELY_NOT_SET"),
    (["seed=${eval:1}"], "eval"),
    # keys without their group, names of other programs, flags in place of settings
    (["lr=0.1"], "there is no setting lr (did you mean optimizer.lr?)"),
    (["epochs=5"], "there is no setting epochs (did you mean training.epochs?)"),
    (["batch_size=64"], "(did you mean training.batch_size or evaluation.batch_size?)"),
    (["training.lr=1"], "there is no setting training.lr (did you mean optimizer.lr?)"),
    (["learning_rate=1"], "(did you mean optimizer.lr?)"),
    (["--lr", "0.1"], "there is no flag --lr; write optimizer.lr=0.1"),
    (["--model", "two_branch"], "write model=two_branch"),
    (["--mutlirun"], "(did you mean --multirun?)"),
    (["optimizer=SGD"], "(did you mean sgd?)"),
    # spaces
    (["seed=0,", "1"], "without spaces: seed=0,1 -m"),
    (["seed=0", "1", "2"], "without spaces: seed=0,1,2 -m"),
    (["seed=", "3"], "write seed=3"),
    (["model.widths=[4,", "8]"], "put quotes around it"),
    (["seed=3", "training.epochs"], "write training.epochs=VALUE"),
    # flags and settings of Hydra that are not ours
    (["--cfg", "all", "--resolve"], "--cfg: invalid choice"),
    (["--package", "seed"], "--package goes with --cfg job only"),
    (["--resolve"], "--resolve goes with --cfg job only"),
    (["--info", "config"], "--info is not supported"),
    (["--hydra-help"], "--hydra-help is not supported"),
    (["--config-path", "x"], "--config-path is not supported: use --config-dir"),
    (["--experimental-rerun", "x"], "--experimental-rerun is not supported"),
    (["-sc", "x"], "-sc install=bash"),
    (["dataset=digits", "dataset.display_names=[]"], "it must be 10 names, one per class"),
    (["hydra.launcher=null"], "hydra.launcher=null is not supported"),
    (
        ["hydra/launcher=submitit_slurm", "hydra.launcher.partitio=gpu"],
        "hydra.launcher.partitio cannot be changed; a key that is not there is added by +hydra",
    ),
    (["hydra.run.dir=x"], "hydra.run.dir=x is not supported"),
    (["hydra.mode=MULTIRUN"], "hydra.mode=MULTIRUN is not supported"),
    (["choices=3"], "choices=3 is wrong"),
    (["choices.model=x"], "choices.model=x is wrong"),
    (["protocol=[1]"], "protocol=[1] is wrong: it must be one of sound, report"),
    (["protocols=3"], "protocols=3 is wrong"),
    (["+protocols.sound.seed.x=1"], "protocols: there is no setting seed.x"),
    # sweeps without an end
    (["seed=range(0,3,0)", "-m"], "a step that is not 0"),
    (["seed=range(0,inf)", "-m"], "a range needs finite numbers"),
    (["seed=range(0,1e9)", "-m"], "a range has 10,000 values at most"),
    (["seed=range(3,0)", "-m"], "the range is empty"),
    (["model=glob(nope*)", "-m"], "it matches no option of a group"),
    (["seed=glob(*)", "-m"], "it matches no option of a group"),
    (["seed=interval(0,1)", "-m"], "add search=optuna"),
    (["seed=range(0,101)", "split.seed=range(0,101)", "-m"], "a grid of 10,201 runs; the most"),
    (["optimizer.lr=interval(0,inf)", "-m", "search=optuna"], "must be below its end"),
    # lines that cannot be read
    (["optimizer.lr"], "optimizer.lr"),
    (["=1"], "there is no setting before ="),
    (["seed=[1"], "seed=[1"),
    (["seed='1"], "seed='1"),
    (["a=b=c={"], "a=b=c={"),
    (["\x00=1"], "=1"),
    (["--nope"], "--nope"),
    (["--cfg", "nope"], "--cfg"),
    (["--config-dir", "nowhere"], "nowhere"),
    (["--config-name", "nowhere"], "nowhere"),
    (["--package", "nowhere", "--cfg", "job"], "nowhere"),
    # targets
    (["model._target_=os.system"], "is not allowed"),
    (["model._target_=torch.load"], "is not allowed: it is not an nn.Module"),
    (["optimizer._target_=torch.optim.Adamm"], "optimizer._target_"),
    (["optimizer._target_=null"], "optimizer"),
    (["figures.curves._target_=os.system"], "figures.curves._target_=os.system is not allowed"),
    # names and folders
    (["name=a/../../b"], "name=a/../../b is wrong"),
    (["name="], "name= is wrong"),
    (["name=" + "x" * 300], "name="),
    (["name=" + "ü" * 300], "name="),
    (["name='a\tb'"], "name="),
    (["output_dir=" + "x" * 300], "output_dir="),
    (["training.best_file_name=../x.pt"], "training.best_file_name=../x.pt is wrong"),
    (["continue_from=nowhere"], "nowhere is not a run folder"),
    (["nowhere"], "nowhere is neither a key=value nor a run folder"),
    (["."], "is neither a key=value nor a run folder"),
    # devices
    (["device=gpu"], "device=gpu is wrong: it must be auto, cuda, cuda:N, mps or cpu"),
    (["device=cuda:99"], "device=cuda:99"),
]
SMALL = ["dataset=digits", "device=cpu"]


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("CIFAR_LAB_DATA", str(tmp_path / "data"))
    return folder


def refused(code: int, out: str, err: str, folder: Path) -> str:
    lines = err.splitlines()
    assert code == 2, (code, out, err)
    assert len(lines) == 1, err
    assert lines[0].startswith("cifar_lab: ")
    assert len(lines[0]) <= 300 + len("cifar_lab: ")
    assert "Traceback" not in err + out
    assert list(folder.rglob("*")) == []
    assert not (folder.parent / "data").exists()
    return lines[0]


@pytest.mark.parametrize(("line", "words"), WRONG, ids=lambda v: " ".join(v)[:60])
def test_a_wrong_request(
    line: list[str], words: str, empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = [w for w in line if w.startswith(("dataset=", "device="))]
    base = [] if line[0] in ("nowhere", ".") else [s for s in SMALL if not own]
    code = train.main([*base, *line])
    message = refused(code, *capsys.readouterr(), empty)
    assert words in message, message


@pytest.mark.parametrize("line", [["+typo=1"], ["optimizer.lr=abc"], ["training.epochs=-1"]])
def test_a_wrong_request_under_cfg(
    line: list[str], empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = train.main([*SMALL, *line, "--cfg", "job"])
    assert line[0].strip("+").partition("=")[0] in refused(code, *capsys.readouterr(), empty)


@pytest.mark.parametrize("command", [train, evaluate])
@pytest.mark.parametrize(
    "arguments",
    [["a folder with spaces"], ["ü" * 200], ["x" * 300], ["../.."], ["a\x00b"], ["--x"]],
)
def test_wrong_folders(
    command: Any, arguments: list[str], empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(command.main(arguments), *capsys.readouterr(), empty)


def test_a_pattern_lists_options() -> None:
    request = compose([*SMALL, "model=glob(convnet*,exclude=*_deep)", "-m"])
    assert [run.config.choices["model"] for run in request.runs] == ["convnet", "convnet_plain"]


def test_a_part_of_the_config_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([*SMALL, "seed=7", "--cfg", "job", "--package", "seed"]) == 0
    assert capsys.readouterr().out == "7\n"
    assert train.main([*SMALL, "--cfg", "job", "--package", "training"]) == 0
    assert capsys.readouterr().out.startswith("epochs: 10\n")


@pytest.mark.parametrize("line", [["seed=1,x", "-m"], ["optimizer.lr=0.1,abc", "-m"]])
def test_one_wrong_cell_of_a_sweep_is_refused_before_any_runs(
    line: list[str], empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(train.main([*SMALL, *line]), *capsys.readouterr(), empty)


def test_a_data_folder_that_is_a_file(
    empty: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = empty.parent / "data file"
    wrong.write_text("rubbish")
    monkeypatch.setenv("CIFAR_LAB_DATA", str(wrong))
    assert train.main(["dataset=mnist"]) == 2
    assert "CIFAR_LAB_DATA" in capsys.readouterr().err.splitlines()[-1]
    assert wrong.read_text() == "rubbish"


def test_a_folder_full_of_rubbish_as_a_dataset(
    empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rubbish = empty.parent / "rubbish"
    for split in ("train", "test"):
        (rubbish / split / "cat").mkdir(parents=True)
        (rubbish / split / "cat" / "a.png").write_bytes(b"\x89PNG no")
        (rubbish / split / "cat" / "Thumbs.db").write_bytes(b"\0" * 100)
    code = train.main(["dataset=image_folder", f"dataset.source.path={rubbish}", "device=cpu"])
    error = capsys.readouterr().err.splitlines()[-1]
    assert code == 2, error
    assert "a.png" in error or "rubbish" in error


def test_a_traceback_is_shown_when_asked_for(
    empty: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CIFAR_LAB_DEBUG", "1")
    assert train.main(["seed=abc"]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    "line", [["optimizer.lrr=1"], ["seed=${nope}", "--cfg", "job"], ["device=cuda:77"], ["nowhere"]]
)
def test_a_wrong_request_in_a_real_process(line: list[str], empty: Path) -> None:
    answer = subprocess.run(
        [sys.executable, "-m", "cifar_lab.train", *line],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HYDRA_FULL_ERROR": "1"},
    )
    refused(answer.returncode, answer.stdout, answer.stderr, empty)


# --- hostile values of valid keys ---------------------------------------------------------------

VALUES = st.one_of(
    st.integers(),
    st.floats(allow_nan=True, allow_infinity=True),
    st.booleans(),
    st.none(),
    st.text(max_size=20),
    st.sampled_from(
        ["..", "/", "a/b", "${x}", "${seed}", "null", "~", "''", "[", "{}", "1e400", "0x1F", "1_0"]
    ),
    st.lists(st.integers(), max_size=3),
)


def keys() -> list[str]:
    shipped = compose_checked(SMALL).runs[0].config
    skipped = ("choices", "study", "figures", "_target_")
    return sorted(k for k in flatten(to_plain(shipped)) if not any(s in k for s in skipped))


@pytest.mark.slow
@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_a_hostile_value_is_refused_in_one_line_or_survives_save_and_load(
    data: st.DataObject, tmp_path: Path
) -> None:
    key = data.draw(st.sampled_from(keys()))
    value = data.draw(VALUES)
    text = value if isinstance(value, str) else str(value).replace("None", "null")
    problem, cells = "", []
    try:
        cells = compose_checked([*SMALL, f"{key}={text}"]).runs
    except UsageError as error:
        problem = str(error)
    assert bool(problem.strip()) != bool(cells)
    assert "\n" not in problem
    if not cells:
        return
    (cell,) = cells
    path = tmp_path / "config.yaml"
    path.write_text(dump(cell.config), encoding="utf-8")
    assert load(path) == cell.config
    assert len(os.fsencode(address(cell.config).name)) <= 255
    numbers = [v for v in flatten(to_plain(cell.config)).values() if isinstance(v, float)]
    assert all(map(math.isfinite, numbers))
