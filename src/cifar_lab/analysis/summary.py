"""What `summarize` says of runs, as one value: for the command, for Python, and for notebooks."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from cifar_lab.analysis import drawing, summary_tables, texts
from cifar_lab.analysis.effects import MainEffects, main_effects
from cifar_lab.analysis.ranking import rank
from cifar_lab.analysis.seed_groups import RunCollection
from cifar_lab.errors import UsageError, listing, shorten

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Summary:
    """Ranked runs, what separates them, and their main effects.

    `test`: test scores are shown for all configurations, not for the best alone.
    """

    collection: RunCollection
    effects: Sequence[MainEffects]
    test: bool = False

    @property
    def table(self) -> list[dict[str, str]]:
        """The ranking, a dict for each configuration: `pandas.DataFrame(summary.table)` works."""
        table = summary_tables.ranking_table(self.collection, test=self.test)
        return [dict(zip(table.header, row, strict=True)) for row in table.rows]

    @property
    def sections(self) -> list[summary_tables.Section]:
        """The document, which summary.md and the console show."""
        return summary_tables.sections(self.collection, self.effects, test=self.test)

    def __str__(self) -> str:
        return summary_tables.as_text(self.sections, 100)

    def _repr_html_(self) -> str:
        """Return what a notebook shows: which configuration is the best, and the ranking."""
        chosen = [group for group in self.collection.ranking if group.chosen]
        lines = [texts.best_text(self.collection, group) for group in chosen]
        table = summary_tables.ranking_table(self.collection, test=self.test)
        return "".join(f"<p>{escape(line)}</p>" for line in lines) + table.html()

    def seeds_needed(self, points: float) -> list[str]:
        """Return how many seeds would show a difference of so many points, for each dataset."""
        return texts.seeds_lines(self.collection, points)

    def figure(self, name: str) -> "Figure":
        """Return the picture `grid`, `curves` or `effects`."""
        if name not in drawing.PICTURES:
            right = listing(drawing.PICTURES)
            raise UsageError(f"there is no picture {shorten(repr(name))}; there are {right}")
        return drawing.PICTURES[name](self.collection)


def summary_of(
    collection: RunCollection,
    *,
    metric: str | None = None,
    baseline: str | None = None,
    test: bool = False,
) -> Summary:
    """Rank a collection that was read, and return what there is to say of it."""
    rank(collection, metric, baseline)
    return Summary(collection, main_effects(collection), test)
