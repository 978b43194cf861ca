import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import cifar_lab

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    command = ["git", "ls-files", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {canonicalize_name(name): version for name, version in (s.split("==") for s in lines)}


def requirements() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"].values()
    texts = [*PROJECT["dependencies"], *(text for extra in extras for text in extra)]
    return [needed for needed in map(Requirement, texts) if needed.name != "cifar-lab"]


def test_no_package_registry_is_named_in_the_project(tracked: list[Path]) -> None:
    # In pieces, so that this file passes its own test.
    hosts = [
        rb"(pypi|pythonhosted|npmjs|debian)" + rb"\.(org|com|net)",
        rb"registry" + rb"\.[a-z]+\.[a-z]+",
        rb"--(extra-)?" + rb"index-url|find-" + rb"links",
    ]
    named = {
        f"{path.relative_to(ROOT)}: {match.group().decode()}"
        for path in tracked
        for host in hosts
        for match in re.finditer(host, path.read_bytes())
    }
    assert named == set()


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_constraints_pin_each_direct_dependency_in_its_range(requirement: Requirement) -> None:
    pinned = constraints()[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(pinned)


def test_version_is_the_same_everywhere() -> None:
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert cited
    assert cited.group(1) == cifar_lab.__version__
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert all(Version(heading) <= Version(cifar_lab.__version__) for heading in headings[1:])


def test_each_command_of_the_package_has_a_console_script() -> None:
    scripts = dict(PROJECT["scripts"])
    commands = {
        path.stem
        for path in (ROOT / "src" / "cifar_lab").glob("*.py")
        if re.search(r"^if __name__ == ", path.read_text(), re.MULTILINE)
    }
    assert {f"cifar_lab.{command}:main" for command in commands} <= set(scripts.values())
    assert scripts.pop("cifar-lab") == "cifar_lab.__main__:main"
    assert all(
        name == f"cifar-lab-{target[10:-5]}".replace("_", "-") for name, target in scripts.items()
    )


@pytest.mark.slow
def test_the_installation_says_what_it_does_and_what_cannot_be_had(tmp_path: Path) -> None:
    for name in ("pyproject.toml", "constraints.txt", "scripts/install.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    bare = {"PATH": os.environ["PATH"], "PIP_NO_INDEX": "1"}  # what pip looks for, it does not find
    command = [sys.executable, "-S", str(tmp_path / "scripts" / "install.py"), "key", ""]

    def said(torch: str) -> str:
        environment = {**bare, "CIFAR_LAB_TORCH": torch}
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert ran.returncode == 1
        assert not (tmp_path / ".venv" / "installed").exists()
        return ran.stderr

    assert "cifar_lab: 1/4 a virtual environment, .venv" in (errors := said("cpu"))
    assert "pip finds no CPU builds of torch==" in errors.splitlines()[-1]
    assert "CIFAR_LAB_TORCH=gpu is wrong: cpu, or unset" in said("gpu").splitlines()[-1]


def package_files() -> set[str]:
    """Return what an installed package must hold, by its path below site-packages."""
    source = ROOT / "src"
    code = (path for path in (source / "cifar_lab").rglob("*") if "__pycache__" not in path.parts)
    files = {path.relative_to(source).as_posix() for path in code if path.is_file()}
    configs = (ROOT / "conf").rglob("*.yaml")
    conf = {f"cifar_lab/{path.relative_to(ROOT).as_posix()}" for path in configs}
    return files | conf | {"cifar_lab/conf/__init__.py"}


@pytest.mark.slow
def test_wheel_holds_every_file_of_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        assert {name for name in archive.namelist() if ".dist-info/" not in name} == package_files()


@pytest.mark.slow
def test_sdist_holds_what_the_wheel_is_built_from(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True)
    (built,) = tmp_path.iterdir()
    with tarfile.open(built) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    packaged = (name.replace("cifar_lab/conf/", "conf/", 1) for name in package_files())
    sources = {name if name.startswith("conf/") else f"src/{name}" for name in packaged}
    assert held >= sources | {"pyproject.toml", "README.md", "LICENSE"}
    assert {name.split("/")[0] for name in held} <= {
        "src", "conf", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff",
        ".gitignore", "PKG-INFO",
    }  # fmt: skip


@pytest.mark.slow
def test_wheel_trains_in_an_empty_folder(installed_wheel: Path, tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CIFAR_LAB_DATA")}

    def output_of(*line: str | Path) -> str:
        return subprocess.run(
            line, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        ).stdout

    where = output_of(installed_wheel, "-c", "import cifar_lab; print(cifar_lab.__file__)")
    assert Path(where.strip()).is_relative_to(installed_wheel.parents[1])
    script = installed_wheel.parent / "cifar-lab"
    output_of(script, "train", "dataset=digits", "training.epochs=1")
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]
    (summary,) = tmp_path.glob("outputs/*/*/summary.json")
    assert '"finished"' in summary.read_text()
