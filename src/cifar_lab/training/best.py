"""best.pt: the weights of the best epoch so far, and whether they are still there."""

import logging

from cifar_lab.config.run_config import RunConfig
from cifar_lab.errors import Damaged
from cifar_lab.runs.files import load_checkpoint, weights_checksum
from cifar_lab.runs.metrics import EpochMetrics, best_row
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.runs.run_files import second_name
from cifar_lab.training.state import TrainState

log = logging.getLogger("cifar_lab")


def write_best(run: RunDir, config: RunConfig, state: TrainState, row: EpochMetrics) -> None:
    """Write best.pt; its second name replaces that of the previous best epoch."""
    name = second_name(config, row)
    weights = state.scored_weights()
    state.best_checksum = weights_checksum(weights)
    best = {
        "model": weights,
        "epoch": state.epoch,
        "val_accuracy": state.best.val_accuracy if state.best else None,
    }
    run.write_best(best, name)
    earlier = [r for r in state.history if r.epoch < row.epoch]
    best_before = best_row(earlier, config.training.monitor)
    if name is not None and best_before is not None:
        former = second_name(config, best_before)
        if former is not None and former != name:
            (run.path / former).unlink(missing_ok=True)
    if name is None:
        log.info("best epoch so far: its weights are in %s", run.best.name)
    else:  # the words of the reports' logs (S2)
        log.info("Best model saved to %s", run.path / name)


def check_best(run: RunDir, state: TrainState) -> None:
    """Raise Damaged if best.pt does not hold the weights of the best epoch so far.

    After a process was killed, best.pt may be of an epoch that last.pt does not include yet; the
    resumed run trains that epoch again.
    """
    if state.best is None:
        return
    remedy = f"the best epoch, {state.best.epoch}, is lost: rerun=true trains again"
    try:
        best = load_checkpoint(run.best)
    except Damaged as error:
        raise Damaged(f"{error}; {remedy}") from None
    if best.get("epoch", 0) > state.epoch:
        return
    checksum = state.best_checksum
    if best.get("epoch") != state.best.epoch or (
        checksum is not None and weights_checksum(best["model"]) != checksum
    ):
        raise Damaged(f"{run.best} holds other weights than it should; {remedy}")
