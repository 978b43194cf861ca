"""`python -m cifar_lab`, and what all commands have in common on the command line."""

import importlib
import importlib.metadata
import io
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from fixtures import Capture, Patch
from tiny_runs import TINY

import cifar_lab
from cifar_lab import cli
from cifar_lab.__main__ import COMMANDS, main
from cifar_lab.errors import Unavailable

SOURCE = Path(cifar_lab.__file__).parent
CONF = Path(__file__).resolve().parents[1] / "conf"


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_the_overview_has_one_line_for_each_command(argv: list[str], capsys: Capture) -> None:
    assert main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    modules = {
        path.stem
        for path in SOURCE.glob("*.py")
        if re.search(r"^if __name__ == ", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    listed = [line.split()[0] for line in lines if line.startswith("  ")]
    assert sorted(listed) == sorted(modules - {"__main__"})
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("command", ["prove_resume", "prove-resume"])
def test_a_command_gets_the_other_arguments_and_gives_its_exit_code(
    command: str, capsys: Capture
) -> None:
    assert main([command, "model=nonsense"]) == 2
    assert "model=nonsense" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("nonsense", "there is no command 'nonsense'; see python -m cifar_lab"),
        ("trian", "there is no command 'trian' (did you mean train?)"),
        ("prove-resum", "(did you mean prove_resume?)"),
        ("--verison", "there is no option '--verison' (did you mean --version?)"),
    ],
)
def test_an_unknown_command_is_one_line_and_exit_code_2(
    argument: str, words: str, capsys: Capture
) -> None:
    assert main([argument, "more"]) == 2
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert words in line
    assert printed.out == ""


def test_every_command_answers_version_with_the_same_line(capsys: Capture) -> None:
    installed = importlib.metadata.version
    expected = (
        f"cifar_lab {cifar_lab.__version__}, torch {installed('torch')}, "
        f"Hydra {installed('hydra-core')}\n"
    )
    for argv in (["--version"], *([command, "--version"] for command in COMMANDS)):
        assert main(argv) == 0
        assert capsys.readouterr() == (expected, "")


HELP = """
import sys, time
from cifar_lab.__main__ import COMMANDS, main
for command in COMMANDS:
    print("page", main([command, "--help"]))
heavy = {'torch', 'hydra', 'sklearn', 'matplotlib'} & set(sys.modules)
print("took", time.process_time(), *heavy)
"""


def test_every_help_page_comes_at_once_and_fits_100_columns() -> None:
    line = [sys.executable, "-c", HELP]
    for attempt in (1, 2):  # other tests share the cores
        printed = subprocess.run(line, capture_output=True, text=True, check=True).stdout
        pages, _, seconds = printed.rpartition("took ")
        if attempt == 2 or float(seconds) < 1:
            break
    assert float(seconds) < 1
    assert max(map(len, pages.splitlines())) <= 100
    for command, page in zip(COMMANDS, pages.split("page 0\n"), strict=False):
        assert page.startswith(f"usage: python -m cifar_lab.{command} ")
        assert "--version" in page


def test_the_help_page_of_train_lists_every_group_and_option(
    tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "my_own.yaml").write_text("_target_: torch.nn.Identity\n")
    (tmp_path / "my_group").mkdir()
    (tmp_path / "my_group" / "mine.yaml").write_text("{}\n")
    assert main(["train", "--help", "--config-dir", str(tmp_path)]) == 0
    page = capsys.readouterr().out
    groups, _, rest = page.partition("The settings used most")
    for path in CONF.rglob("*/*.yaml"):
        if path.parent.name == "report":
            continue  # what reports claim is no option of a run
        assert re.search(rf"\b{path.stem}\b", groups), path
        assert re.search(rf"^  {path.parent.relative_to(CONF)} ", groups, re.MULTILINE), path
    assert not re.search("^  report ", groups, re.MULTILINE)
    assert "my_own" in groups
    assert "  my_group       mine" in groups
    assert "  model          airbench, airbench_small, convnet*, " in groups
    assert "  optimizer.lr=0.001 " in rest
    assert "  training.patience=null " in rest
    assert rest.count("    python -m cifar_lab.train ") == 3


def test_a_long_path_does_not_hide_what_was_wrong(capsys: Capture) -> None:
    """What was wrong stands after the path, and what to do at the end."""
    folder = Path("/", *(["a-folder-with-a-long-name"] * 12), "the-run")

    def fail(argv: list[str]) -> int:
        raise Unavailable(f"{folder} was not sent: no answer; repeat `track {folder} --again`")

    assert cli.run(fail, []) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert len(line) <= len("cifar_lab: ") + cli.LONGEST_MESSAGE
    assert "/the-run was not sent: no answer; repeat `track" in line
    assert line.endswith("/the-run --again`")


def test_a_fault_of_ours_is_one_line_and_its_traceback_on_request(
    capsys: Capture, monkeypatch: Patch
) -> None:
    def broken(words: list[str]) -> int:
        raise KeyError("lr")

    assert cli.run(broken, []) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "cifar_lab: KeyError: 'lr' (CIFAR_LAB_DEBUG=1 shows where)"
    monkeypatch.setenv("CIFAR_LAB_DEBUG", "1")
    assert cli.run(broken, []) == 1
    assert "in broken" in capsys.readouterr().err


class Sink:
    """What a logging library puts in the place of a stream: it can write, and nothing else."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> None:
        self.text += text


class Closed(io.StringIO):
    """What answers every question with ValueError."""

    def __init__(self) -> None:
        super().__init__()
        self.close()


@pytest.mark.parametrize("kind", [Sink, type(None), Closed, io.BytesIO])
def test_commands_and_functions_run_without_standard_streams(
    kind: type, tmp_path: Path, monkeypatch: Patch
) -> None:
    """As in a service, under pythonw, or where loguru has taken the streams."""
    monkeypatch.setattr(sys, "stdout", kind())
    monkeypatch.setattr(sys, "stderr", kind())
    words = [*TINY, "training.epochs=1", "figures=none", f"output_dir={tmp_path}"]
    assert main(["train", *words]) == 0
    assert main(["train", "modle=x"]) == 2
    assert cifar_lab.run(*words).status == "finished"
    if isinstance(sys.stderr, Sink):
        assert "there is no setting modle" in sys.stderr.text


def test_what_is_printed_has_no_password(capsys: Capture, monkeypatch: Patch) -> None:
    monkeypatch.setenv("MY_TOKEN", "hushed-token")
    monkeypatch.setenv("PROXY", "https://me:hushed-word@proxy:80/")

    def command(words: list[str]) -> int:
        print("see https://me:hushed@host:80/a?key=hushed, hushed-token, hushed-word.")
        raise Unavailable("no answer from http://x@host/?hushed")

    assert cli.run(command, []) == 3
    printed = capsys.readouterr()
    assert printed.out == "see https://host:80/a ***, ***.\n"
    assert printed.err == "cifar_lab: no answer from http://host/\n"


def test_a_warning_of_a_library_is_one_line(capsys: Capture) -> None:
    def command(words: list[str]) -> int:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("Corrupt EXIF data.\nExpecting more.", stacklevel=2)
        return 0

    assert cli.run(command, []) == 0
    assert capsys.readouterr().err == "warning: Corrupt EXIF data. Expecting more.\n"


def test_an_output_folder_that_cannot_be_one(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "loop").symlink_to("loop")
    link = "is a link that leads to itself"
    for folder, words in (("loop", link), ("loop/below", link), ("/proc/x", "cannot be a folder")):
        assert main(["train", *TINY, f"output_dir={tmp_path / folder}"]) == 2
        assert words in capsys.readouterr().err
