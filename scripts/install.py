"""Create .venv and install cifar_lab into it, editable: scripts/install.py KEY [EXTRA].

Called by scripts/venv. KEY is written to a stamp file at the end, so that the next call repeats an
installation that was interrupted. Processes that start together wait for each other.
"""

import fcntl
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = str(VENV / "bin" / "python")
OLDEST_TORCH = (2, 11)

INSTALLED_TORCH = """
import importlib.metadata, json
found = {}
for name in ("torch", "torchvision"):
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
print(json.dumps(found))
"""


def main(key: str, extra: str) -> None:
    """Install the dependencies of pyproject.toml, then write the stamps."""
    stamps = [VENV / "installed", *([VENV / f"installed-{extra}"] if extra else [])]
    with one_at_a_time():
        if all(stamp.is_file() and stamp.read_text() == f"{key}\n" for stamp in stamps):
            return
        if not pip_works():
            say("1/4 a virtual environment, .venv")
            make_venv()
        install_torch()
        install(f".[{extra}]" if extra else ".")
        say("4/4 a look whether it works")
        # A torch and a torchvision of different builds install without an error and fail here.
        subprocess.run([PYTHON, "-c", "import torchvision, cifar_lab"], check=True, cwd=ROOT)
        for stamp in stamps:
            stamp.write_text(f"{key}\n")


def say(step: str) -> None:
    """Print a step of the installation."""
    print(f"cifar_lab: {step}", file=sys.stderr, flush=True)


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Hold a lock that the system releases when this process ends, however it ends."""
    with (ROOT / ".venv.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def pip_works() -> bool:
    """Return False if creating .venv was interrupted or its Python no longer exists."""
    if not Path(PYTHON).exists():
        return False
    return subprocess.run([PYTHON, "-m", "pip", "--version"], capture_output=True).returncode == 0


def make_venv() -> None:
    """Create .venv, with access to the system's packages if their torch is new enough."""
    # Inside a venv, the new one would see the packages of the system and not those of that venv.
    in_venv = sys.prefix != sys.base_prefix
    shared = [] if in_venv or not installed_torch(sys.executable) else ["--system-site-packages"]
    subprocess.run([sys.executable, "-m", "venv", "--clear", *shared, VENV], check=True)


def installed_torch(python: str) -> dict[str, str]:
    """Return the versions of torch and torchvision of a Python; empty if torch is too old."""
    answer = subprocess.run(
        [python, "-c", INSTALLED_TORCH], check=True, capture_output=True, text=True, cwd=ROOT
    )
    versions: dict[str, str] = json.loads(answer.stdout)
    major, minor = versions.get("torch", "0.0").split(".")[:2]
    return versions if (int(major), int(minor)) >= OLDEST_TORCH else {}


def install_torch() -> None:
    """Install torch and torchvision unless they are there, or their CPU builds if asked to."""
    if installed_torch(PYTHON):
        return
    kind = os.environ.get("CIFAR_LAB_TORCH", "")
    if kind not in ("", "cpu"):
        sys.exit(f"cifar_lab: CIFAR_LAB_TORCH={kind} is wrong: cpu, or unset for pip's choice")
    known = ("-c", "constraints.txt")
    pinned = [line for line in pins() if line.split("==")[0] in ("torch", "torchvision")]
    if kind == "cpu":
        say("2/4 the CPU builds of torch and torchvision (about 200 MB, 0.8 GB when installed)")
        if pip_install(*known, *(f"{line}+cpu" for line in pinned), check=False):
            sys.exit(
                f"cifar_lab: pip finds no CPU builds of {' and '.join(pinned)}: name the index "
                "of pytorch.org in PIP_EXTRA_INDEX_URL, or unset CIFAR_LAB_TORCH"
            )
        return
    cuda = sys.platform == "linux" and platform.machine() == "x86_64"
    size = "with CUDA's libraries about 3 GB, 5.7 GB when installed" if cuda else "about 200 MB"
    hint = "; CIFAR_LAB_TORCH=cpu takes builds without them" if cuda else ""
    say(f"2/4 torch and torchvision ({size}{hint})")
    pip_install(*known, *pinned)


def install(target: str) -> None:
    """Install the target under constraints.txt, but keep a torch that is already installed."""
    present = installed_torch(PYTHON)
    ours = {"torch", "torchvision", "triton"} if present else set[str]()
    kept = [line for line in pins() if line.split("==")[0] not in ours]
    kept += [f"{name}=={version}" for name, version in present.items()]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        constraints.write("\n".join(kept) + "\n")
        constraints.flush()
        say(f"3/4 the other packages of {target}")
        pip_install("-c", constraints.name, "-e", target)


def pins() -> list[str]:
    """Return the lines of constraints.txt."""
    return (ROOT / "constraints.txt").read_text().splitlines()


def pip_install(*words: str, check: bool = True) -> int:
    """Run pip, with its bars on a terminal and silently elsewhere; return its exit code."""
    quiet = [] if sys.stderr.isatty() else ["-q"]
    command = [PYTHON, "-m", "pip", "install", "--disable-pip-version-check", *quiet, *words]
    # On standard error, as all that the installation says: the command's own output is a run's.
    return subprocess.run(command, check=check, cwd=ROOT, stdout=sys.stderr).returncode


if __name__ == "__main__":
    try:
        main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "")
    except subprocess.CalledProcessError as error:
        sys.exit(f"cifar_lab is not installed: {shlex.join(map(str, error.cmd))} failed")
