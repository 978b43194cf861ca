"""The features' two main directions (principal component analysis)."""

from typing import TYPE_CHECKING

from cifar_lab.figures.embedding import Array, Projection, panels
from cifar_lab.runs.run_dir import RunDir

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(run: RunDir, sample_size: int = 2000, seed: int = 0) -> "Figure":
    """Return the features of test images on their first two principal components, by class.

    `sample_size`: at most so many images, drawn by `seed`.
    """
    return panels([run], [""], "PCA", project, sample_size, seed)


def project(features: Array, seed: int = 0) -> Projection:
    """Return features (n, D) on their first two components, and how much each explains."""
    from sklearn.decomposition import PCA

    pca = PCA(n_components=2, random_state=seed)
    points = pca.fit_transform(features)
    first, second = (
        f"component {i} ({100 * share:.1f} % of the variance)"
        for i, share in enumerate(pca.explained_variance_ratio_, start=1)
    )
    return points, first, second
