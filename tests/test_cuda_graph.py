"""training.cuda_graph: the passes on static buffers give the bits of the plain step.

On a CPU they run uncaptured, after the same warm-up; tests/test_gpu.py captures them.
"""

from pathlib import Path

import pytest
from tiny_runs import TINY, make, train

from cifar_lab.analysis.run_differences import differences
from cifar_lab.errors import UsageError
from cifar_lab.training.preflight import compose_checked
from cifar_lab.training.step import GraphedPasses

VARIED = (
    (
        *("dropout.conv=0.2", "training.lookahead.every=3", "augmentation.mixup=0.4"),
        *("training.frozen_epochs=1", "optimizer.backbone_lr=0.0001"),
    ),
    ("precision=bf16", "training.clip_grad_norm=0.5"),
    ("scheduler=one_cycle", "optimizer=sgd"),
)


@pytest.mark.slow
@pytest.mark.parametrize("options", VARIED, ids=lambda words: words[0])
def test_the_bits_are_those_of_the_plain_step(
    tmp_path: Path, options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An epoch of the digits has a last batch of another size."""
    made: list[GraphedPasses] = []
    before = GraphedPasses.__init__

    def noted(self: GraphedPasses, *arguments: object) -> None:
        made.append(self)
        before(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(GraphedPasses, "__init__", noted)
    plain = train(tmp_path, *options)
    assert made == []
    graphed = train(tmp_path, *options, "training.cuda_graph=true")
    assert plain.path != graphed.path
    assert differences(plain, graphed) == []
    (passes,) = made
    # two sizes of batches, and again once the head no longer trains alone
    assert passes.graphs == (4 if "training.frozen_epochs=1" in options else 2)


def test_auto_is_the_plain_step_and_moves_no_run(tmp_path: Path) -> None:
    assert make(tmp_path).path == make(tmp_path, "training.cuda_graph=auto").path
    with pytest.raises(UsageError, match=r"training\.cuda_graph=true is wrong: it must be auto or"):
        compose_checked([*TINY, "training.cuda_graph=true", "training.compile=true"])
