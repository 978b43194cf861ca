"""The written rule by which a report's figure is set against measured ones."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cifar_lab.config import ClaimConfig, RunConfig
from cifar_lab.significance import interval, t_quantile

SEEDS_FOR_A_VERDICT = 3

Word = Literal[
    "reproduced",
    "consistent",
    "differs",
    "differs so far",
    "cannot be judged",
    "not measured yet",
]


@dataclass(frozen=True)
class Verdict:
    """A word of the rule, and the reason in a few more."""

    word: Word
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.word} ({self.reason})" if self.reason else self.word


def judge(claim: ClaimConfig, config: RunConfig, values: Sequence[float]) -> Verdict:
    """Return the verdict on a claim, given one measured value per seed.

    Cannot be judged: `study.hinges_on` names a guess that decides the figure. With three seeds or
    more: reproduced if the reported figure lies in the 95 % prediction interval for one more run,
    mean ± t * s * sqrt(1 + 1/n), with the binomial variance added where the validation images are
    drawn at random (a report's draw is not ours); else differs. With fewer: consistent within the
    claim's tolerance, else differs so far.
    """
    found = interval(values)
    if found is None:
        return Verdict("not measured yet")
    off = found.mean - claim.value
    if config.study.hinges_on:
        return Verdict("cannot be judged", f"{config.study.hinges_on} guessed; off by {off:+.4g}")
    if found.n < SEEDS_FOR_A_VERDICT or found.std is None:
        if claim.tolerance is None:
            return Verdict("cannot be judged", f"no tolerance and {found.n} seed")
        near = abs(off) <= claim.tolerance * (1 + 1e-9)
        reason = f"off by {off:+.4g}, tolerance {claim.tolerance:g}, n = {found.n}"
        return Verdict("consistent" if near else "differs so far", reason)
    half = prediction_half_width(claim, config, values)
    if abs(off) <= half:
        return Verdict("reproduced", f"within ±{half:.4g}, n = {found.n}")
    return Verdict("differs", f"off by {off:+.4g}, one more run within ±{half:.4g}")


def prediction_half_width(claim: ClaimConfig, config: RunConfig, values: Sequence[float]) -> float:
    """Return half the width of the 95 % prediction interval for one more run's value."""
    found = interval(values)
    if found is None or found.std is None:
        raise ValueError("a prediction interval needs at least two values")
    variance = found.std**2 * (1 + 1 / found.n)
    split = config.split
    drawn = split.method in ("random", "stratified") and split.validation > 0
    if drawn and "val_accuracy" in claim.metric:
        size = config.dataset.train_size or 0
        images = split.validation if split.validation >= 1 else split.validation * size
        variance += found.mean * (1 - found.mean) / max(images, 1)
    return t_quantile(found.n - 1) * math.sqrt(variance)
