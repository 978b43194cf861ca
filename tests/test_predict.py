"""Pictures of any size, asked of a past run."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures import Capture, Folders
from PIL import Image
from tiny_runs import copy_run, make, train

import cifar_lab
from cifar_lab import evaluate, predict
from cifar_lab.analysis import ensembles
from cifar_lab.datasets.pictures import Fit
from cifar_lab.errors import UsageError
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.training.build import load_splits
from cifar_lab.training.preflight import compose_checked
from cifar_lab.training.scoring import probabilities

SMALL = ["dataset=digits", "model.widths=[4,8]", "model.hidden=16", "figures=none", "device=cpu"]


@pytest.fixture
def run(tiny_finished: RunDir) -> RunDir:
    return tiny_finished


def save(path: Path, pixels: np.ndarray, **options: object) -> Path:
    Image.fromarray(pixels).save(path, **options)  # type: ignore[arg-type]
    return path


def test_a_test_image_is_answered_as_in_evaluation(run: RunDir, tmp_path: Path) -> None:
    splits = load_splits(run.read_config(), "cpu")
    scored = run.read_predictions()
    paths = [
        save(tmp_path / f"{i}.png", splits.test.images[splits.test.indices[i], 0].numpy())
        for i in range(12)
    ]
    rows = probabilities(run, paths)
    assert rows == pytest.approx(scored.probabilities[:12], abs=1e-4)
    assert rows.sum(axis=1) == pytest.approx(1)


def test_table_names_the_most_probable_classes(
    run: RunDir, tmp_path: Path, capsys: Capture
) -> None:
    random = np.random.default_rng(0)
    photo = save(tmp_path / "photo.jpg", random.integers(0, 256, (300, 200, 3), dtype=np.uint8))
    tiny = save(tmp_path / "tiny.png", random.integers(0, 256, (5, 90), dtype=np.uint8))
    assert predict.main([str(run.path), str(photo), str(tiny), "--top", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    rows = probabilities(run, [photo, tiny])
    best = [run.class_names()[int(row.argmax())] for row in rows]
    assert [line.split()[1] for line in (lines[1], lines[3])] == best
    shares = [float(value) for value in re.findall(r"([\d.]+) %", "\n".join(lines))]
    assert shares[0] >= shares[1]
    assert shares[0] == pytest.approx(100 * rows[0].max(), abs=0.01)


def test_arrays_open_pictures_and_files_are_answered_alike(run: RunDir, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    gray = random.integers(0, 256, (3, 32, 32), dtype=np.uint8)
    rows = probabilities(run, gray)
    assert rows.shape == (3, 10)
    assert np.array_equal(rows, probabilities(run, gray[..., None]))
    paths = [save(tmp_path / f"{i}.png", pixels) for i, pixels in enumerate(gray)]
    mixed = [gray[0], Image.fromarray(gray[1]), str(paths[2])]
    for same in (paths, [Image.open(path) for path in paths], mixed):
        assert np.array_equal(rows, probabilities(run, same))
    assert probabilities(run, paths[0])[0] == pytest.approx(rows[0], abs=1e-6)
    photos = random.integers(0, 256, (2, 48, 40, 3), dtype=np.uint8)
    files = [save(tmp_path / f"photo{i}.png", photo) for i, photo in enumerate(photos)]
    assert np.array_equal(probabilities(run, photos), probabilities(run, files))
    assert probabilities(run, []).shape == (0, 10)


@pytest.mark.parametrize(
    ("pictures", "words"),
    [
        (np.zeros((32, 32, 3), np.uint8), "put one picture into a list"),
        (np.zeros((32, 32), np.uint8), "put one picture into a list"),
        (np.zeros((2, 3, 32, 32), np.uint8), "picture 0 is an array of shape [3, 32, 32]"),
        (np.zeros((2, 32, 32)), "picture 0 is an array of float64; it must be uint8"),
        ([np.zeros((32, 32), np.uint8), 7], "picture 1 is of type int; it must be a path"),
        (["nowhere.png"], "nowhere.png: there is no such picture"),
    ],
)
def test_what_is_no_picture_is_refused(pictures: Any, words: str, run: RunDir) -> None:
    with pytest.raises(UsageError, match=re.escape(words)):
        probabilities(run, pictures)


def test_a_picture_is_fitted_as_the_run_or_the_user_says(
    run: RunDir, tmp_path: Path, capsys: Capture
) -> None:
    pixels = np.zeros((32, 96), dtype=np.uint8)
    pixels[:, :32] = 255
    picture = save(tmp_path / "wide.png", pixels)
    fits: tuple[Fit, ...] = ("crop", "resize", "pad")
    rows = {fit: probabilities(run, [picture], fit=fit)[0] for fit in fits}
    assert np.array_equal(probabilities(run, [picture])[0], rows["crop"])
    assert not np.allclose(rows["crop"], rows["resize"])
    assert not np.allclose(rows["resize"], rows["pad"])
    assert predict.main([str(run.path), str(picture), "--fit", "pad", "--top", "1"]) == 0
    assert f"{100 * rows['pad'].max():.2f} %" in capsys.readouterr().out


def test_a_run_that_has_no_weights_yet_says_how_to_train_it(
    tmp_path: Path, capsys: Capture
) -> None:
    queued = RunDir.create(compose_checked([*SMALL, f"output_dir={tmp_path}"]).runs[0].config)
    picture = save(tmp_path / "picture.png", np.zeros((9, 9), dtype=np.uint8))
    assert predict.main([str(queued.path), str(picture)]) == 2
    assert "python -m cifar_lab.train" in capsys.readouterr().err


def test_the_answers_are_a_table_and_pictures_with_their_classes(
    run: RunDir, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(0)
    for name in ("a/photo.jpg", "b/photo.png", "b/small.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        size = (8, 8) if "small" in name else (300, 200)
        save(tmp_path / name, random.integers(0, 256, (*size, 3), dtype=np.uint8))
    save(tmp_path / "b" / "deep.png", np.full((300, 200), 9000, dtype=np.uint16))
    save(tmp_path / "b" / "thin.png", np.zeros((9000, 1), dtype=np.uint8))
    pictures = [str(tmp_path / "a"), str(tmp_path / "b")]
    csv, folder = tmp_path / "answers.csv", tmp_path / "new" / "labelled"
    line = [str(run.path), *pictures, "--csv", str(csv), "--save", str(folder)]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9)  # the limit is dataset.max_megapixels
    assert predict.main(line) == 0
    assert f"pictures: {folder}" in capsys.readouterr().out
    header, *lines = (row.split(",") for row in csv.read_text().splitlines())
    assert header == ["picture", "class", "probability", *"0123456789"]
    for picture, label, probability, *rest in lines:
        assert Path(picture).exists()
        assert float(rest[int(label)]) == float(probability) == max(map(float, rest))
        assert sum(map(float, rest)) == pytest.approx(1)
    sizes = {"photo.png": (400, 650), "photo-2.png": (400, 650), "small.png": (256, 288)}
    sizes |= {"deep.png": (400, 650), "thin.png": (1, 9012)}
    assert {path.name for path in folder.iterdir()} == set(sizes)
    for name, size in sizes.items():
        with Image.open(folder / name) as labelled:
            assert labelled.size == size
            assert name != "deep.png" or labelled.getpixel((9, 9)) == (35, 35, 35)
    assert predict.main([str(run.path), *pictures, "--save", pictures[0]]) == 2
    assert "holds the pictures themselves" in capsys.readouterr().err


# --- several runs as one classifier ------------------------------------------------------------


@pytest.fixture(scope="module")
def members(tiny_finished: RunDir, tmp_path_factory: Folders) -> list[RunDir]:
    other = train(tmp_path_factory.mktemp("ensemble"), "seed=1", "training.epochs=1")
    third = copy_run(tiny_finished, tmp_path_factory.mktemp("third"))
    return [tiny_finished, other, third]


def expected_accuracy(members: list[RunDir]) -> float:
    """The same with sums of softmax in plain numpy."""
    total = 0
    for run in members:
        with np.load(run.path / "predictions.npz") as arrays:
            powers = np.exp(arrays["logits"].astype(np.float64))
            labels = arrays["labels"]
        total = total + powers / powers.sum(axis=1, keepdims=True)
    return float((np.argmax(total, axis=1) == labels).mean())


def test_evaluate_scores_the_mean_of_probabilities(members: list[RunDir], capsys: Capture) -> None:
    paths = [str(run.path) for run in members]
    assert evaluate.main([*paths, "--ensemble"]) == 0
    *answers, last = capsys.readouterr().out.splitlines()
    assert len(answers) == 3
    accuracy = expected_accuracy(members)
    assert f"ensemble of 3 runs: test accuracy {accuracy:.2%}" in last
    found = cifar_lab.Runs(cifar_lab.load_run(path) for path in paths)
    assert found.test_accuracy == accuracy


def test_predict_takes_several_runs(members: list[RunDir], tmp_path: Path, capsys: Capture) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)
    picture = tmp_path / "a.png"
    Image.fromarray(pixels).save(picture)
    loaded = [cifar_lab.load_run(run.path) for run in members]
    rows = cifar_lab.Runs(loaded).predict(picture, device="cpu")
    each = [run.predict(picture, device="cpu") for run in loaded]
    assert rows == pytest.approx((each[0] + each[1] + each[2]) / 3)
    assert predict.main([*(str(run.path) for run in members), str(picture), "--top", "2"]) == 0
    _, first, _ = capsys.readouterr().out.splitlines()
    assert first.endswith(f"{100 * rows[0].max():.2f} %")


def refused(main: object, words: list[str], capsys: Capture) -> str:
    assert main(words) == 2  # type: ignore[operator]
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    return str(said.err)


def test_runs_that_cannot_be_averaged_are_refused_before_anything_is_written(
    members: list[RunDir], tmp_path: Path, capsys: Capture
) -> None:
    first, config = str(members[0].path), members[0].read_config()
    summary = members[0].read_summary()
    other = RunDir.create(dataclasses.replace(config, output_dir=str(tmp_path), name="others"))
    classes = [{"class": str(i), "accuracy": 0.5} for i in range(9)]
    other.write_summary(dataclasses.replace(summary, per_class_accuracy=classes))
    assert "is given twice" in refused(evaluate.main, [first, first, "--ensemble"], capsys)
    assert "two runs or more" in refused(evaluate.main, [first, "--ensemble"], capsys)
    split = make(tmp_path, "split.source=test", "split.validation=100")
    split.write_summary(summary)
    message = refused(evaluate.main, [first, str(split.path), "--ensemble"], capsys)
    assert "is tested on other images than" in message
    data = dataclasses.replace(summary, dataset=summary.dataset | {"test_labels": "0"})
    other.write_summary(data)
    message = refused(evaluate.main, [first, str(other.path), "--ensemble"], capsys)
    assert "is tested on other images than" in message
    dataset = dataclasses.replace(config.dataset, classes=[f"no {i}" for i in range(10)])
    third = RunDir.create(dataclasses.replace(config, dataset=dataset, output_dir=str(tmp_path)))
    for main, more in ((evaluate.main, "--ensemble"), (predict.main, "x.png")):
        assert "has other classes than" in refused(main, [first, str(third.path), more], capsys)
    assert "there is no picture" in refused(predict.main, [first, first], capsys)


def test_images_are_matched_by_their_index(members: list[RunDir], tmp_path: Path) -> None:
    mixed = RunDir.create(dataclasses.replace(members[1].read_config(), output_dir=str(tmp_path)))
    found = members[1].read_predictions()
    order = np.random.default_rng(0).permutation(len(found))
    shuffled = dataclasses.replace(
        found, logits=found.logits[order], labels=found.labels[order], indices=found.indices[order]
    )
    mixed.write_predictions(shuffled, "test", "scored")
    a, b = ensembles.mean_predictions(members[:2]), ensembles.mean_predictions([members[0], mixed])
    assert np.array_equal(a.logits, b.logits)
