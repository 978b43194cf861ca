"""training.cuda_graph: the passes on static buffers give the bits of the plain step.

On a CPU they run uncaptured, after the same warm-up; tests/test_gpu.py captures them.
"""

from pathlib import Path

import pytest
import torch
from tiny_runs import TINY, make, train

from cifar_lab.analysis import resume_proof
from cifar_lab.errors import UsageError
from cifar_lab.runs.checkpoints import load_checkpoint
from cifar_lab.runs.metrics import TIMES, EpochMetrics, columns
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.training.preflight import compose_checked
from cifar_lab.training.step import GraphedPasses

VARIED = {
    "batch_norm_and_dropout": ("dropout.conv=0.2", "dropout.dense=0.3"),
    "bf16_and_clipping": ("precision=bf16", "training.clip_grad_norm=0.5"),
    "mixed_images": ("augmentation.mixup=0.4", "optimizer=sgd", "optimizer.lr=0.1"),
    "a_head_that_trains_first": ("training.frozen_epochs=1", "optimizer.backbone_lr=0.0001"),
    "slow_weights_and_averages": ("training.lookahead.every=3", "training.ema=0.9"),
    "a_schedule_of_batches": ("scheduler=one_cycle", "scheduler.max_lr=0.01"),
}


def tensors(run: RunDir) -> dict[str, torch.Tensor]:
    state = load_checkpoint(run.last)
    return {name: state["model"][name] for name in state["model"]}


def rows(run: RunDir) -> list[tuple[object, ...]]:
    names = [name for name in columns(EpochMetrics) if name not in TIMES]
    return [tuple(getattr(row, name) for name in names) for row in run.read_metrics()]


@pytest.mark.parametrize("options", VARIED.values(), ids=VARIED.keys())
def test_the_bits_are_those_of_the_plain_step(tmp_path: Path, options: tuple[str, ...]) -> None:
    """An epoch of the digits has a last batch of another size."""
    plain = train(tmp_path, *options)
    graphed = train(tmp_path, *options, "training.cuda_graph=true")
    assert plain.path != graphed.path
    assert rows(plain) == rows(graphed)
    there, here = tensors(plain), tensors(graphed)
    assert all(torch.equal(there[name], here[name]) for name in there)


def test_a_run_with_static_buffers_is_resumed_exactly(tmp_path: Path) -> None:
    run = make(tmp_path / "run", "training.cuda_graph=true", "dropout.conv=0.2")
    assert "bit for bit" in resume_proof.prove(run.read_config(), tmp_path / "proof", stops=4)[-1]


def test_there_is_a_graph_for_each_shape_and_set_of_trained_parameters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[GraphedPasses] = []
    before = GraphedPasses.__init__

    def noted(self: GraphedPasses, *arguments: object) -> None:
        made.append(self)
        before(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(GraphedPasses, "__init__", noted)
    train(tmp_path, "training.cuda_graph=true", "training.frozen_epochs=1", "training.epochs=3")
    (passes,) = made
    # two sizes of batches, while the head trains alone and after
    assert passes.graphs == 4


def test_auto_is_the_plain_step_and_moves_no_run(tmp_path: Path) -> None:
    assert make(tmp_path).path == make(tmp_path, "training.cuda_graph=auto").path
    with pytest.raises(UsageError, match=r"training\.cuda_graph=true is wrong: it must be auto or"):
        compose_checked([*TINY, "training.cuda_graph=true", "training.compile=true"])
