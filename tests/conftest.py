import os
import shutil
from collections import Counter

# Several processes of tests share the cores; and a thread count that is the same everywhere gives
# the same weights everywhere. Before the first import of torch, which reads it once.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest

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
