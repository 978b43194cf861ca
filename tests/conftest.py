import os
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from pathlib import Path

# Several processes of tests share the cores; and a thread count that is the same everywhere gives
# the same weights everywhere. Before the first import of torch, which reads it once.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest

ROOT = Path(__file__).resolve().parent.parent
TIERS = ("slow", "real_data", "browser", "slurm", "gpu")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow")
    parser.addoption("--real-data", action="store_true", help="run the tests on CIFAR-10 and MNIST")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = {tier for item in items for tier in TIERS if item.get_closest_marker(tier)}
    for tier in TIERS:
        reason = why_not(tier, config) if tier in wanted else ""
        if reason:
            for item in items:
                if item.get_closest_marker(tier):
                    item.add_marker(pytest.mark.skip(reason=f"{tier}: {reason}"))


def why_not(tier: str, config: pytest.Config) -> str:
    if tier == "slow":
        return "" if config.getoption("--slow") else "asked for by --slow"
    if tier == "real_data":
        return "" if config.getoption("--real-data") else "asked for by --real-data"
    if tier in ("browser", "slurm") and not config.getoption("--slow"):
        return "asked for by --slow"
    if tier == "browser":
        return "" if shutil.which("chromium") else "no chromium on the PATH"
    if tier == "slurm":
        return "" if shutil.which("slurmctld") else "no slurmctld on the PATH"
    import torch  # seconds, and only a test of the tier pays for them

    return "" if torch.cuda.is_available() else "no CUDA device"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    counts = Counter[tuple[str, str]]()
    for outcome in ("passed", "failed", "error", "skipped", "xfailed"):
        for report in terminalreporter.getreports(outcome):
            tiers = [tier for tier in TIERS if tier in report.keywords] or ["fast"]
            counts.update((tier, outcome) for tier in tiers)
    terminalreporter.section("tiers")
    for tier in ("fast", *TIERS):
        outcomes = [f"{n} {outcome}" for (name, outcome), n in counts.items() if name == tier]
        terminalreporter.line(f"{tier}: {', '.join(outcomes) or 'no tests'}")


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as a wheel, built from a copy: setuptools writes beside what it builds."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("pyproject.toml", "setup.py", "LICENSE", "README.md", "src", "conf"):
        copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "-w", str(folder), str(source)], check=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def installed_wheel(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The python of a new environment that holds the wheel, and this one's other packages."""
    venv = tmp_path_factory.mktemp("installed") / "venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    python = venv / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "-q", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True)
    # Their .pth files are not read, so that an editable cifar_lab stays out of sight.
    site = Path(sysconfig.get_path("purelib", vars={"base": str(venv)}))
    folders = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (site / "packages.pth").write_text("\n".join(folders) + "\n")
    return python


def copy(origin: Path, target: Path) -> None:
    for path in [origin] if origin.is_file() else sorted(origin.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts and "egg-info" not in str(path):
            copied = target / path.relative_to(origin)
            copied.parent.mkdir(parents=True, exist_ok=True)
            copied.write_bytes(path.read_bytes())
