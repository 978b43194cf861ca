"""A process of torchrun other than the first: it trains the same run, and writes nothing."""

from typing import Any

import torch

from cifar_lab.config import targets
from cifar_lab.config.run_config import parse
from cifar_lab.errors import Stopped, UsageError
from cifar_lab.runs.provenance import code_version
from cifar_lab.training.build import build_state
from cifar_lab.training.data import load_splits
from cifar_lab.training.device import configure
from cifar_lab.training.distributed import Processes, lost_connection
from cifar_lab.training.loop import Diverged, fit
from cifar_lab.training.signals import Stop


def follow(group: Processes, stop: Stop) -> int:
    """Train the run that process 0 opens, until it ends; return the exit code.

    What process 0 says too, and what follows from the end of another process, is not repeated
    here. Raises RunFailed where this process is the one that failed.
    """
    try:
        request = group.share()
        if request["config"] is not None:
            _train(group, stop, request)
    except Diverged:
        return Diverged.exit_code
    except Stopped as stopped:
        return 128 + stopped.signal
    except Exception as error:
        if lost_connection(error):
            return 1
        raise group.report(error) from error
    return 0


def _train(group: Processes, stop: Stop, request: dict[str, Any]) -> None:
    """Build the run as process 0 does, take over its state, and train."""
    targets.trust(request["trust"])
    config = parse(request["config"])
    if code_version(config) != request["code"]:
        raise UsageError("its code is not that of process 0; install the same on all machines")
    device = group.device(config.device)
    configure(device, request["threads"], config.deterministic)
    torch.manual_seed(config.seed)
    splits = load_splits(config, device)
    state, batches = build_state(config, splits, device, group=group)
    state.take_over(group.share())
    watched = splits.test if config.evaluation.watch_test else None
    with stop.graceful():
        for progress in fit(
            state,
            batches,
            splits.validation,
            config.training,
            config.evaluation,
            watched=watched,
        ):
            if group.any(stop.is_wanted(progress)):
                return
