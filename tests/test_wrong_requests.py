"""Wrong requests: one line that names the key and what is right, exit code 2, nothing written.

One case a branch; random lines are in test_fuzz.py.
"""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fixtures import Capture, Patch

from cifar_lab import train
from cifar_lab.config.compose import compose
from cifar_lab.runs.run_dir import RunDir

SMALL = ["dataset=digits", "device=cpu"]
# Words are separated by spaces; RUN is a finished run, GROUP the folder that it is in.
# {command: (the line, what its one line of answer must contain)}
WRONG: dict[str, list[tuple[str, str]]] = {
    "train": [
        # keys
        ("typo=1", "there is no setting typo"),
        ("optimizer.lrr=1", "optimizer.lrr (did you mean lr?)"),
        ("lr=0.1", "there is no setting lr (did you mean optimizer.lr?)"),
        ("bs=64", "did you mean training.batch_size or evaluation.batch_size?"),
        ("split.val=0.2", "did you mean validation?"),
        # options of groups
        ("model=convnett", "did you mean convnet"),
        ("model.weights=nowhere.pt", "it must be a file of torch.save or safetensors"),
        ("model=resnet18", "write model=torchvision model.architecture=resnet18"),
        ("dataset.limit=2000", "it must be from 10, one for each class, to the 1,437"),
        ("model=[convnet,two_branch]", "model=[convnet,two_branch] is wrong"),
        ("~model", "~model is wrong"),
        ("+model=convnet", "+model=convnet is wrong: one option replaces another; leave"),
        ("scheduler=plateau", "did you mean reduce_on_plateau?"),
        ("dropout=0.5", "single values are written as in dropout.conv=0.5"),
        ("dataset=../model/convnet", "dataset=../model/convnet is wrong"),
        ("model@x=convnet", "packages (@) are not supported"),
        ("model=convnet,two_branch", "add -m"),
        # values: types
        ("training.epochs=abc", "training.epochs=abc is wrong: it must be a whole number"),
        ("seed=[1,2] -m", "it must be a whole number; several values are seed=1,2 with -m"),
        ("dataset.mean=autos", "must be a list or auto"),
        # values: ranges
        ("optimizer.lr=-1", "optimizer"),
        ("dropout.conv=1.5", "dropout.conv=1.5 is wrong: it must be at least 0 and less than 1"),
        ("training.class_weights=[1,2]", "must be balanced or 10 numbers above 0, one per class"),
        ("training.cuda_graph=true training.compile=true", "cuda_graph=true is wrong: it must be"),
        ("training.monitor=val_macro", "did you mean val_macro_f1"),
        ("seed=" + "9" * 5000, "seed="),
        ("augmentation.cutout=33", "cutout=33 is wrong: it must be at most the image's"),
        ("augmentation.padding_mode=reflect augmentation.crop_padding=32", "must be less than the"),
        ("split.validation=1436", "leaves 1 training image"),
        ("precision=fp8", "precision=fp8 is wrong: it must be one of auto, fp32, bf16, fp16"),
        ("device=gpu", "device=gpu is wrong: it must be auto, cuda, cuda:N, mps or cpu"),
        ("device=cuda:99", "device=cuda:99"),
        # values that do not fit together
        ("model=two_branch dropout=standard", "dropout"),
        ("model=two_branch dropout=none training.frozen_epochs=1", "no module `classifier`"),
        ("scheduler=reduce_on_plateau split.validation=0", "split.validation is 0"),
        ("scheduler=reduce_on_plateau scheduler.monitor=test_loss", "test set"),
        ("scheduler=cosine scheduler.step=never", "scheduler.step=never is wrong"),
        ("scheduler=one_cycle scheduler.total_steps=1", "scheduler.total_steps=1 is wrong"),
        ("optimizer.capturable=true", "cannot take a training step"),
        ("optimizer=muon scheduler=one_cycle", "one rate for all parameters"),
        ("optimizer=muon +optimizer.backbone_lr=0.1", "divides the parameters itself"),
        ("optimizer=muon optimizer.momentum=1.5", "momentum=1.5 must be"),
        ("training.monitor=val_loss split.validation=0", "training.monitor=val_loss is wrong"),
        ("split.validation=0 training.patience=1", "training.patience"),
        ("evaluation.scored_weights=averaged", "best or last without training.ema"),
        ("training.ema=0.9 training.compile=true", "it must be false with training.ema"),
        ("dataset.image_shape=[3,8]", "dataset.image_shape"),
        ("dataset.display_names=[]", "it must be 10 names, one per class"),
        ("+dataset.fit=pad", "dataset.fit=pad is wrong: the images of digits"),
        ("+dataset.storage=mapped", "dataset.storage=mapped is wrong"),
        # folds
        ("split.folds=5", "split.folds=5 needs the fold"),
        ("split.folds=5 split.fold=5", "split.fold=5 is wrong: it must be from 0 to 4"),
        ("split.folds=5 split.fold=0 split.validation=300", "it must be 0.2 with split.folds=5"),
        ("split.folds=5 split.fold=0 split.source=test", "it must be train with"),
        # interpolations
        ("seed=${seed}", "seed cannot be resolved: "),
        ("name=${oc.env:SURELY_NOT_SET}", "SURELY_NOT_SET"),
        # flags in place of settings, spaces
        ("--lr 0.1", "there is no flag --lr; write optimizer.lr=0.1"),
        ("--plan", "write plan=true"),
        ("--config my.yaml", "the config of a run is the first word: my.yaml"),
        ("digits", "digits is not a key=value: write dataset=digits"),
        ("--mutlirun", "(did you mean --multirun?)"),
        ("seed=0, 1", "without spaces: seed=0,1 -m"),
        ("optimizer=sgd, adam", "without spaces: optimizer=sgd,adam -m"),
        ("seed= 3", "write seed=3"),
        ("model.widths=[4, 8]", "put quotes around it"),
        ("training.epochs = 3", "write training.epochs=3"),
        # flags and settings of Hydra that are not ours
        ("--cfg all", "--cfg: invalid choice"),
        ("--cfg job training.epochs=-1", "training.epochs=-1 is wrong"),
        ("--config-dir nowhere", "nowhere"),
        ("-sc x", "-sc install=bash"),
        ("hydra.launcher=null", "hydra.launcher=null is not supported"),
        ("hydra/launcher=joblib", "it must be one of ray, submitit_slurm"),
        ("hydra/launcher=submitit_slurm hydra.launcher.partitio=gpu", "Could not override"),
        ("choices.model=x", "choices.model=x is wrong"),
        ("RUN protocol=report", "protocol=sound cannot be changed"),
        ("protocol=[1]", "protocol=[1] is wrong: it must be one of sound, report"),
        ("+protocols.sound.seed.x=1", 'seed={"x": 1} is wrong: it must be a whole number'),
        # sweeps and searches
        ("seed=range(0,1e9) -m", "a range must have 1 to 10,000 numbers"),
        ("model=glob(nope*) -m", "it matches no option of a group"),
        ("seed=interval(0,1) -m", "add search=optuna"),
        ("seed=range(0,101) split.seed=range(0,101) -m", "a grid of 10,201 runs; the most"),
        ("points=[{seed:1}]", "add -m"),
        ("-m points=3", "points=3 is wrong: it must be a list"),
        ("search=optuna", "search=optuna has no values to choose from: add -m"),
        ("-m search=optuna points=[{seed:1}]", "are for a grid"),
        ("-m search=optuna seed=0,1 search.study=../x", "search.study=../x is wrong"),
        ("-m search=optuna model.hidden=interval(8,64)", "must be a whole number"),
        ("-m search=optuna optimizer.lr=interval(0,inf)", "must be below its end"),
        ("-m seed=0,1 jobs=1,3", "jobs takes one value"),
        ("-m search=optuna seed=0,1 search.seeds=3", "repeats every setting with other seeds"),
        ("-m seed=0,1 search.seeds=3", "search.seeds is for search=optuna; a grid lists"),
        ("-m search=optuna seed=0,1 search.seeds=3 search.pruner=hyperband", "median or none"),
        # lines that cannot be read
        ("seed=[1", "seed=[1"),
        ("dataset.source.path=Bücher", """with quotes it can: 'dataset.source.path="Bücher"'"""),
        ("optimizer.betas=(0.9,0.99)", "write it as in optimizer.betas=[0.9,0.999]"),
        ("-m seed=range(a)", "cannot be read: mismatch type argument start"),
        ("dataset=npz dataset.source.path=1e3", """quotes: 'dataset.source.path="..."'"""),
        ("name=2024", """in quotes: 'name="2024"'"""),
        # targets
        ("model._target_=torch.load", "is not allowed: it is not an nn.Module"),
        ("optimizer._target_=torch.optim.Adamm", "optimizer._target_"),
        # names and folders
        ("name=a/../../b", "name=a/../../b is wrong"),
        ("continue_from=nowhere", "nowhere is not a run folder"),
        ("nowhere", "nowhere is neither a key=value nor a run folder"),
        # trackers
        ("tracker=mlflow tracker.uri=localhost:5000", "such as http://localhost:5000"),
        ("tracker=mlflow tracker.uri=http://me:secret@host", "MLFLOW_TRACKING_USERNAME"),
        ("tracker=trackio tracker.server=host", "tracker.server=host is wrong"),
        ("tracker=trackio tracker.server=http://h tracker.space=a/b", "leave one out"),
        ("tracker=tensorboard tracker.wait_seconds=0", "more than 0"),
        ("+tracker._target_=torch.load", "is not a tracker of cifar_lab.trackers"),
        ("+tracker.uri=http://host", "tracker has no _target_"),
    ],
    "evaluate": [
        ("RUN --device meta", "device=meta is wrong"),
        ("RUN --errors 0", "--errors 0 is wrong: it must be from 1 to 1,000"),
        ("RUN RUN --errors 3", "is given twice"),
        ("RUN --ensemble", "two runs or more"),
    ],
    "predict": [
        ("nowhere x.png", "not a run folder"),
        ("RUN", "image"),
        ("RUN RUN", "there is no picture"),
        ("RUN x.png --csv out.txt", "the name must end with .csv"),
        ("RUN x.png --save /dev/null", "--save /dev/null is wrong: it is a file"),
    ],
    "draw": [
        ("nowhere", "nowhere is not a folder"),
        (".", "has no finished run"),
        ("RUN figures=embedings", "did you mean embeddings?"),
        ("RUN figures.pca.sample=1", "did you mean sample_size?"),
        ("RUN --format jpg", "invalid choice: 'jpg'"),
        ("RUN --labels nowhere.yaml", "--labels nowhere.yaml: "),
    ],
    "export": [
        ("nowhere --format pt2", "not a run folder"),
        ("RUN", "--format"),
        ("RUN --format pt2 --output RUN", "is wrong: it is a folder"),
        ("RUN --format pt2 --output m.onnx", "m.onnx is wrong: that is no name for pt2"),
        ("RUN --format safetensors --output m.safetensors", "it is the folder for two files"),
    ],
    "track": [
        ("RUN", "add tracker=tensorboard, mlflow"),
        ("RUN tracker=mlfow", "did you mean mlflow?"),
        ("tracker=tensorboard", "takes one folder"),
        (". tracker=tensorboard", "has no finished run"),
    ],
    "tidy": [
        (".", "holds no run of that kind"),
        ("RUN --older-than 3", "--older-than 3 is wrong: it must be 12h, 30d or 4w"),
        ("RUN --archive runs.tar", "the name must end with .zip"),
    ],
    "watch": [
        ("nowhere", "nowhere is not a folder"),
        (".", "holds no run yet"),
        ("RUN --serve x", "--serve x is wrong: it must be from 0 to 65,535"),
        ("RUN --host no.such.host.invalid --serve 0", "on no.such.host.invalid: "),
    ],
    "summarize": [
        (".", "holds no run"),
        ("GROUP --metric best_val_acuracy", "did you mean best_val_accuracy?"),
        ("GROUP --detect 0", "--detect 0 is wrong: it must be from 0.001 to 100.0"),
        ("GROUP --baseline sgd", "KEY=VALUE"),
        ("GROUP --baseline optimizer=sgd", "do not differ in optimizer"),
        ("GROUP --latex table.txt", "--latex table.txt is wrong: the name must end with .tex"),
        ("GROUP --csv nowhere/table.csv", "there is no folder nowhere"),
    ],
    "compare": [("RUN nowhere", "nowhere")],
    "describe": [
        ("--images 5,x", "numbers"),
        ("--images 1437", "from 0 to 1436"),
        ("--figure images.txt", ".png"),
        ("--figure /dev/null/images.png", "there is no folder /dev/null"),
        ("--settings trainin", "did you mean training?"),
        ("--settings training.foo", "training has epochs, frozen_epochs"),
        ("--settings training seed=1", "seed=1"),
        ("--lr-range --images 1", "leave out one"),
    ],
    "benchmark": [
        ("--only epock", "did you mean epoch?"),
        ("--proflie", "did you mean --profile?"),
        ("plan=true", "a benchmark is of one run, but this is a plan"),
        ("--json ", "--json needs the name of a file"),
        ("-m seed=0,1", "a benchmark is of one run, but this is 2"),
    ],
    "prove_resume": [("--stops 0", "--stops"), ("optimizer.lrr=1", "did you mean lr?")],
}

COMPOSING = ("train", "describe", "benchmark", "prove_resume")


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: Patch) -> Path:
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
    assert "secret" not in err
    assert out == ""
    assert list(folder.rglob("*")) == []
    assert not (folder.parent / "data").exists()
    return lines[0]


@pytest.mark.parametrize(
    ("command", "line", "words"),
    [(command, *case) for command, cases in WRONG.items() for case in cases],
    ids=lambda text: text[:60],
)
def test_a_wrong_request(
    command: str, line: str, words: str, empty: Path, tiny_finished: RunDir, capsys: Capture
) -> None:
    files = sorted(tiny_finished.path.rglob("*"))
    own = "RUN" in line
    for place, path in (("RUN", tiny_finished.path), ("GROUP", tiny_finished.path.parent)):
        line = line.replace(place, str(path))
    asked = line.split(" ")
    if command in COMPOSING and not own and asked[0] not in ("nowhere", ".", "--settings"):
        keys = [word.partition("=")[0] for word in asked]
        asked = [word for word in SMALL if word.partition("=")[0] not in keys] + asked
    capsys.readouterr()  # of the fixture
    code = importlib.import_module(f"cifar_lab.{command}").main(asked)
    message = refused(code, *capsys.readouterr(), empty)
    assert words in message, message
    assert sorted(tiny_finished.path.rglob("*")) == files


def test_a_pattern_lists_options() -> None:
    request = compose([*SMALL, "model=glob(convnet*,exclude=*_deep)", "-m"])
    assert [run.config.choices["model"] for run in request.runs] == ["convnet", "convnet_plain"]


def test_the_config_is_shown(capsys: Capture) -> None:
    assert train.main([*SMALL, "seed=7", "--cfg", "job"]) == 0
    assert "seed: 7\n" in capsys.readouterr().out


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
