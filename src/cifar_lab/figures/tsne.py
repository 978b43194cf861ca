"""The features' neighbourhoods in the plane (t-SNE, van der Maaten and Hinton 2008)."""

import functools
from typing import TYPE_CHECKING

from cifar_lab.figures.embedding import Array, Projection, panels
from cifar_lab.runs.run_dir import RunDir

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COMPONENTS = 50
"""Features are reduced to this many principal components first, as the method's authors do."""


def draw(run: RunDir, sample_size: int = 2000, perplexity: float = 30.0, seed: int = 0) -> "Figure":
    """Return the features of test images in the plane, near where their features are near.

    `sample_size`: at most so many images, drawn by `seed`; `perplexity`: about how many neighbours
    count, lowered to a third of the images where there are few.
    """
    method = functools.partial(project, perplexity=perplexity)
    return panels([run], [""], "t-SNE", method, sample_size, seed)


def project(features: Array, seed: int = 0, perplexity: float = 30.0) -> Projection:
    """Return features (n, D) in the plane; the same seed gives the same points."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    components = min(COMPONENTS, *features.shape)
    reduced = PCA(n_components=components, random_state=seed).fit_transform(features)
    perplexity = min(perplexity, (len(features) - 1) / 3)
    tsne = TSNE(perplexity=perplexity, init="pca", random_state=seed)
    # Threads add up a sum in the order in which they finish, and t-SNE amplifies the last bit.
    with threadpool_limits(1, user_api="openmp"):
        points = tsne.fit_transform(reduced)
    return points, f"t-SNE 1 (perplexity {perplexity:.3g})", "t-SNE 2"
