"""List the commands of cifar_lab, or run one: `python -m cifar_lab [COMMAND [ARGUMENT...]]`."""

import importlib
import sys
from collections.abc import Sequence

from cifar_lab import cli
from cifar_lab.errors import UsageError, did_you_mean

# Each command is the module of the same name, imported only when it runs.
COMMANDS = {
    "train": "train and evaluate one run, or many with -m",
    "evaluate": "evaluate past runs from their folders",
    "predict": "classify pictures with a past run",
    "draw": "draw the figures of finished runs again, for a paper too",
    "export": "write a run's network as ONNX, torch.export or safetensors",
    "track": "send finished runs to a tracker: TensorBoard, MLflow, W&B, trackio",
    "summarize": "compare the runs below a folder",
    "compare": "compare two runs, with a paired test on their predictions",
    "tidy": "show what takes space; remove or archive what is named",
    "watch": "follow runs while they train: a live table, or the summary page in a browser",
    "describe": "show a dataset's counts and a model's layers",
    "reproduce": "run a report's experiments and compare its figures with the measured ones",
    "benchmark": "measure training throughput beside a plain PyTorch loop",
    "prove_resume": "stop and resume a run at random steps and compare the results bit for bit",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first argument names with the others; without one, list them all."""
    name, *arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    command = name.replace("-", "_")
    if command in COMMANDS:
        return int(importlib.import_module(f"cifar_lab.{command}").main(arguments))
    return cli.run(_overview, [name])


def _overview(argv: list[str]) -> int:
    (argument,) = argv
    if argument not in ("-h", "--help"):
        kind = "option" if argument.startswith("-") else "command"
        hint = did_you_mean(argument, ["--help", "--version", *COMMANDS])
        raise UsageError(f"there is no {kind} {argument!r}{hint}; see python -m cifar_lab")
    width = max(map(len, COMMANDS))
    print("usage: cifar-lab COMMAND [ARGUMENT...]   (or: python -m cifar_lab COMMAND ...)\n")
    for name, purpose in COMMANDS.items():
        print(f"  {name:{width}}  {purpose}")
    print("\ncifar-lab COMMAND --help explains a command; --version prints the versions.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
