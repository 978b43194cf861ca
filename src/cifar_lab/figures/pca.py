"""The features' two main directions (principal component analysis)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cifar_lab.figures import embedding
from cifar_lab.runs.run_dir import RunDir

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(run: RunDir, sample_size: int = 2000, seed: int = 0) -> "Figure":
    """Return the features of test images on their first two principal components, by class.

    `sample_size`: at most so many images, drawn by `seed`.
    """
    return side_by_side([run], [""], sample_size, seed)


def side_by_side(
    runs: Sequence[RunDir], titles: Sequence[str], sample_size: int = 2000, seed: int = 0
) -> "Figure":
    """Return one such panel per run, each on its own components."""
    return embedding.panels(runs, titles, "PCA", project, sample_size, seed)


def project(features: embedding.Array, seed: int = 0) -> embedding.Projection:
    """Return features (n, D) on their first two components, and how much each explains."""
    from sklearn.decomposition import PCA

    pca = PCA(n_components=2, random_state=seed)
    points = pca.fit_transform(features)
    first, second = (
        f"component {i} ({100 * share:.1f} % of the variance)"
        for i, share in enumerate(pca.explained_variance_ratio_, start=1)
    )
    return embedding.Projection(points, first, second)
