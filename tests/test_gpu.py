"""What only a CUDA device can show. Skipped where there is none; `scripts/measure_gpu` runs it."""

from pathlib import Path

import pytest
import torch
from tiny_runs import TINY, config_of

from cifar_lab import train as train_command
from cifar_lab.analysis import resume_proof
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.training.build import build_state, load_splits
from cifar_lab.training.run import run_experiment
from cifar_lab.training.step import Step, make_criterion

pytestmark = pytest.mark.gpu

ON_GPU = ("device=cuda", "deterministic=true")


def finished(folder: Path, *overrides: str) -> RunDir:
    run = RunDir.create(config_of(f"output_dir={folder}", *ON_GPU, *overrides))
    run_experiment(run)
    return run


def test_batches_are_those_of_the_cpu_and_logits_are_close() -> None:
    config = config_of("augmentation=crop_flip")
    states = [
        build_state(config, load_splits(config, device), device) for device in ("cpu", "cuda")
    ]
    with torch.no_grad():
        batches = [next(batches.epoch(1))[0] for _, batches in states]
        logits = [
            state.model.eval()(b).cpu() for (state, _), b in zip(states, batches, strict=True)
        ]
    assert torch.equal(batches[0], batches[1].cpu())
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("graph", ["auto", "true"])
def test_deterministic_runs_are_equal_and_resume_exactly(tmp_path: Path, graph: str) -> None:
    words = (*ON_GPU, "dropout.conv=0.2", f"training.cuda_graph={graph}")
    twice = [finished(tmp_path / name, *words[2:]) for name in ("one", "other")]
    assert resume_proof.differences(*twice) == []
    config = config_of(f"output_dir={tmp_path}", *words)
    assert "bit for bit" in resume_proof.prove(config, tmp_path / "proof", stops=4)[-1]


def test_a_graph_trains_as_the_plain_step(tmp_path: Path) -> None:
    """The kernels are the same; algorithms that are chosen by measuring are switched off."""
    plain, graphed = (
        finished(tmp_path, "dropout.conv=0.2", f"training.cuda_graph={value}")
        for value in ("auto", "true")
    )
    there, here = (run.read_metrics()[-1] for run in (plain, graphed))
    assert there.train_loss == pytest.approx(here.train_loss, rel=1e-4)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_the_host_does_not_wait_within_an_epoch() -> None:
    config = config_of("device=cuda", "augmentation=crop_flip")
    state, batches = build_state(config, load_splits(config, "cuda"), "cuda")
    criterion = make_criterion(config.training, batches.split, batches.num_classes)
    step = Step(state, criterion, config.training)
    state.train_mode(head_only=False)
    epoch = batches.epoch(1)
    step.passes(*next(epoch))  # what is set up once may wait
    step.update()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for images, labels in epoch:
            step.passes(images, labels)
            step.update()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_too_little_memory_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.cuda.empty_cache()
    held = torch.cuda.memory_allocated() + 64 * 2**20
    torch.cuda.set_per_process_memory_fraction(
        held / torch.cuda.get_device_properties(0).total_memory
    )
    try:
        large = ("model.widths=[512,512]", "training.batch_size=450")
        code = train_command.main([*TINY, *ON_GPU, *large, f"output_dir={tmp_path}"])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert code == 1
    lines = [
        line for line in capsys.readouterr().err.splitlines() if line.startswith("cifar_lab: ")
    ]
    assert len(lines) == 1
    assert "try a smaller training.batch_size" in lines[0]
