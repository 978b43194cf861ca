"""The JSON schemas accept what cifar_lab ships, refuse misspelt keys."""

import copy
import functools
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from cifar_lab import describe
from cifar_lab.config.compose import compose
from cifar_lab.config.json_schema import run_schema
from cifar_lab.config.run_config import load, to_plain

ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf"
FILES = sorted(path.relative_to(CONF).as_posix() for path in CONF.rglob("*.yaml"))
RUNS = sorted((ROOT / "docs" / "results").rglob("config.yaml"))


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8")) or {}


@pytest.fixture(scope="module")
def schemas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the schemas of the files of conf/, as an installation does into conf/schema."""
    folder = tmp_path_factory.mktemp("schemas") / "schema"
    assert describe.main(["--schema", str(folder)]) == 0
    return folder


def validator_of(file: str, schemas: Path) -> jsonschema.Draft7Validator:
    """Read the schema that a file names for editors, after the package that Hydra wants first."""
    path = CONF / file
    prefix = "# yaml-language-server: $schema="
    lines = path.read_text(encoding="utf-8").splitlines()[:2]
    (named,) = [line.removeprefix(prefix) for line in lines if line.startswith(prefix)]
    named_path = (path.parent / named).resolve()
    assert named_path.parent == CONF / "schema"
    return checked_validator(schemas / named_path.name)


@functools.cache
def checked_validator(path: Path) -> jsonschema.Draft7Validator:
    schema = json.loads(path.read_text(encoding="utf-8"))
    jsonschema.Draft7Validator.check_schema(schema)
    return jsonschema.Draft7Validator(schema)


FREE_GROUPS = ("hydra", "checksums", "additional_parameters", "resources", "env_vars")  # any keys


@pytest.mark.parametrize("file", FILES)
def test_every_file_of_conf_is_valid_and_no_misspelt_key_is(file: str, schemas: Path) -> None:
    validator, content = validator_of(file, schemas), read(CONF / file)
    validator.validate(content)
    assert not validator.is_valid({**content, "learnin_rate": 0.1})
    for key, group in content.items():
        if isinstance(group, dict) and key not in FREE_GROUPS:
            assert not validator.is_valid({**content, key: {**group, "learnin_rate": 0.1}}), key


def test_runs_are_valid_and_misspelt_keys_and_wrong_values_are_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert describe.main(["--schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema == run_schema()
    validator = jsonschema.Draft7Validator(schema)
    for path in RUNS:
        validator.validate(to_plain(load(path)))
    config = json.loads(json.dumps(to_plain(compose(["optimizer=sgd"]).runs[0].config)))
    validator.validate(config)
    for group, key, value in (
        ("training", "epochz", 3),
        ("training", "epochs", -1),
        ("optimizer", "lrr", 0.1),
        ("optimizer", "lr", "fast"),
        ("model", "hiden", 4),
        ("dropout", "conv", 1.5),
    ):
        wrong = copy.deepcopy(config)
        wrong[group][key] = value
        assert not validator.is_valid(wrong), (group, key, value)
    del config["dataset"]
    assert not validator.is_valid(config)
