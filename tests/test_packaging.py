import os
import re
import stat
import subprocess
import sys
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
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {canonicalize_name(name): version for name, version in (s.split("==") for s in lines)}


def requirements() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"].values()
    texts = [*PROJECT["dependencies"], *(text for extra in extras for text in extra)]
    return [one for one in map(Requirement, texts) if canonicalize_name(one.name) != "cifar-lab"]


def test_no_package_registry_is_named_in_the_project(tracked: list[Path]) -> None:
    # In pieces, so that this file passes its own test.
    hosts = [
        rb"(pypi|pythonhosted|npmjs|debian)" + rb"\.(org|com|net)",
        rb"registry" + rb"\.[a-z]+\.[a-z]+",
        rb"--(extra-)?" + rb"index-url|find-" + rb"links",
    ]
    found = {
        f"{path.relative_to(ROOT)}: {match.group().decode()}"
        for path in tracked
        for host in hosts
        for match in re.finditer(host, path.read_bytes())
    }
    assert found == set()


def test_no_lock_file_of_another_installer_is_tracked(tracked: list[Path]) -> None:
    locks = {"uv.lock", "poetry.lock", "pdm.lock", "Pipfile.lock", "package-lock.json"}
    assert locks.isdisjoint(path.name for path in tracked)


def test_constraints_are_names_and_versions() -> None:
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line)


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_constraints_pin_each_direct_dependency_in_its_range(requirement: Requirement) -> None:
    pinned = constraints()[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(pinned)


@pytest.mark.parametrize("name", ["scripts/train", "scripts/test", "scripts/venv", ".ci/run"])
def test_scripts_are_executable(name: str) -> None:
    assert (ROOT / name).stat().st_mode & stat.S_IXUSR


def test_version_is_the_same_everywhere() -> None:
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert cited
    assert cited.group(1) == cifar_lab.__version__
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert all(Version(heading) <= Version(cifar_lab.__version__) for heading in headings[1:])


def test_each_command_of_the_package_has_a_console_script() -> None:
    scripts = PROJECT["scripts"]
    commands = {
        path.stem
        for path in (ROOT / "src" / "cifar_lab").glob("*.py")
        if re.search(r"^if __name__ == ", path.read_text(), re.MULTILINE)
    }
    assert {f"cifar_lab.{command}:main" for command in commands} <= set(scripts.values())
    assert all(
        name == f"cifar-lab-{target[10:-5]}".replace("_", "-") for name, target in scripts.items()
    )


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, cifar_lab; print(*sorted({'torch', 'hydra', 'numpy'} & set(sys.modules)))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert loaded.stdout.strip() == ""


@pytest.mark.slow
def test_wheel_holds_every_module_and_every_yaml(wheel: Path) -> None:
    source = ROOT / "src"
    modules = {
        str(path.relative_to(source))
        for package in ("cifar_lab", "hydra_plugins")
        for path in (source / package).rglob("*.py")
    }
    yamls = {f"cifar_lab/{path.relative_to(ROOT)}" for path in (ROOT / "conf").rglob("*.yaml")}
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held >= modules | yamls | {"cifar_lab/py.typed"}
    assert all(name.startswith(("cifar_lab/", "hydra_plugins/")) for name in held)


@pytest.mark.slow
def test_wheel_trains_in_an_empty_folder(installed_wheel: Path, tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CIFAR_LAB_DATA")}
    origin = [str(installed_wheel), "-c", "import cifar_lab; print(cifar_lab.__file__)"]
    where = subprocess.run(
        origin, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert Path(where.stdout.strip()).is_relative_to(installed_wheel.parents[1])

    command = [str(installed_wheel.parent / "cifar-lab-train"), "dataset=digits"]
    trained = subprocess.run(
        [*command, "training.epochs=1"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert trained.returncode == 0, trained.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]
    (summary,) = tmp_path.glob("outputs/*/*/summary.json")
    assert '"finished"' in summary.read_text()
