import copy
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import types
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

# Several processes of tests share the cores; and a thread count that is the same everywhere gives
# the same weights everywhere. Before the first import of torch, which reads it once.
os.environ["OMP_NUM_THREADS"] = "1"

import hydra
import pytest
import yaml
from hydra.core.global_hydra import GlobalHydra

if TYPE_CHECKING:  # torch takes seconds, and only some files need it
    from cifar_lab.runs.run_dir import RunDir

ROOT = Path(__file__).resolve().parent.parent
# precision=auto is fp32 on every machine, so that addresses and values are the same.
os.environ["CIFAR_LAB_PRECISION"] = str(ROOT / "tests" / "data" / "no_evidence.json")
TIERS = ("slow", "real_data", "browser", "slurm", "ray", "gpu")


@pytest.fixture(scope="session", autouse=True)
def _compositions() -> Iterator[None]:
    """Parse the same YAML and compose the same options of conf/ once for all tests.

    Hydra takes a tenth of a second for each composition, a third of it to parse YAML.
    """
    real, kept, parsed = hydra.compose, {}, {}

    def parse_once(stream: TextIO | str, Loader: Any) -> Any:
        text = stream if isinstance(stream, str) else stream.read()
        if text not in parsed:
            parsed[text] = yaml.load(text, Loader=Loader)
        return copy.deepcopy(parsed[text])

    def compose_once(name: str, overrides: list[str], return_hydra_config: bool) -> Any:
        places = GlobalHydra.instance().config_loader().get_search_path().get_path()
        if any(place.provider == "command-line" for place in places):  # a folder of a test's own
            return real(name, overrides, return_hydra_config)
        key = (str(places), name, *overrides)
        if key not in kept:
            kept[key] = real(name, overrides, return_hydra_config)
        return copy.deepcopy(kept[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hydra, "compose", compose_once)
        of_omegaconf = types.SimpleNamespace(**vars(yaml) | {"load": parse_once})
        patch.setattr("omegaconf.omegaconf.yaml", of_omegaconf)
        yield


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow")
    parser.addoption("--real-data", action="store_true", help="run the tests on CIFAR-10 and MNIST")
    lines = "random command lines of the slow tier (2000)"
    parser.addoption("--fuzz-lines", type=int, default=2000, metavar="N", help=lines)


def pytest_configure(config: pytest.Config) -> None:
    """Let hypothesis draw ten times as many examples in the slow tier."""
    if config.getoption("--slow"):
        import hypothesis

        hypothesis.settings.register_profile("slow", max_examples=1000)
        hypothesis.settings.load_profile("slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    tiers_of = {item: [tier for tier in TIERS if item.get_closest_marker(tier)] for item in items}
    wanted = {tier for tiers in tiers_of.values() for tier in tiers}
    reasons = {tier: why_not(tier, config) for tier in TIERS if tier in wanted}
    for item, tiers in tiers_of.items():
        # For the closing lines. A report's keywords would not do: they hold parameters' names too.
        item.user_properties.append(("tiers", tiers))
        for tier in tiers:
            if reasons[tier]:
                item.add_marker(pytest.mark.skip(reason=f"{tier}: {reasons[tier]}"))


def why_not(tier: str, config: pytest.Config) -> str:
    if tier == "real_data":
        return "" if config.getoption("--real-data") else "run with --real-data"
    if tier != "gpu" and not config.getoption("--slow"):
        return "run with --slow"
    for needed, program in (("browser", "chromium"), ("slurm", "slurmctld")):
        if tier == needed and not shutil.which(program):
            return f"no {program} on the PATH"
    if tier == "ray" and not importlib.util.find_spec("ray"):
        return "the package ray is not installed"
    if tier != "gpu":
        return ""
    import torch  # seconds, and only a test of the tier pays for them

    return "" if torch.cuda.is_available() else "no CUDA device"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Close with one line per tier: how many tests passed, failed or were skipped, and why."""
    counts = {tier: Counter[str]() for tier in ("fast", *TIERS)}
    reasons = {tier: set[str]() for tier in counts}
    for outcome in ("passed", "failed", "error", "skipped", "xfailed"):
        for report in terminalreporter.getreports(outcome):
            # A file that cannot be collected has no properties.
            properties = dict(getattr(report, "user_properties", ()))
            for tier in properties.get("tiers") or ["fast"]:
                counts[tier][outcome] += 1
                if outcome == "skipped":
                    reason = report.longrepr[2].removeprefix("Skipped: ")
                    reasons[tier].add(reason.removeprefix(f"{tier}: "))
    terminalreporter.section("tiers")
    for tier, outcomes in counts.items():
        numbers = ", ".join(f"{number} {outcome}" for outcome, number in outcomes.items())
        why = f" ({'; '.join(sorted(reasons[tier]))})" if reasons[tier] else ""
        terminalreporter.line(f"{tier}: {numbers or 'no tests'}{why}")


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as a wheel, built as pip builds it, with the backend of this environment."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "-w", str(folder), str(ROOT)], check=True)
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


# --- runs that many tests read or damage: train no other where one of these will do ---------------


@pytest.fixture(scope="session")
def tiny_finished(tmp_path_factory: pytest.TempPathFactory) -> "RunDir":
    """A finished run of two epochs with nearly every file of a run folder, to read only."""
    from tiny_runs import RICH, train

    return train(tmp_path_factory.mktemp("tiny_finished"), *RICH)


@pytest.fixture(scope="session")
def tiny_stopped(tmp_path_factory: pytest.TempPathFactory) -> "RunDir":
    """The run of `tiny_finished`, stopped after 3 of 9 steps of its second epoch, to read only.

    It has a best.pt and a row of the first epoch, last.pt, and
    draws no figure when it ends.
    """
    from tiny_runs import NOTED, StopIn, make

    from cifar_lab.errors import Stopped
    from cifar_lab.training.run import run_experiment

    run = make(tmp_path_factory.mktemp("tiny_stopped"), *NOTED)
    with pytest.raises(Stopped, match="epoch 2, step 3 of 9"):
        run_experiment(run, stop=StopIn("train", 2, 3))
    return run


@pytest.fixture
def finished(tiny_finished: "RunDir", tmp_path: Path) -> "RunDir":
    """A copy of `tiny_finished` below tmp_path/outputs: to damage, move or evaluate."""
    from tiny_runs import copy_run

    return copy_run(tiny_finished, tmp_path / "outputs")


@pytest.fixture
def stopped(tiny_stopped: "RunDir", tmp_path: Path) -> "RunDir":
    """A copy of `tiny_stopped` below tmp_path/outputs: to damage, move or continue."""
    from tiny_runs import copy_run

    return copy_run(tiny_stopped, tmp_path / "outputs")
