"""The picture of a balanced subset: the reports before and after, the largest clusters by name, and the labels.

Reports that lie near each other are alike: t-SNE (van der Maaten and Hinton, 2008) of the vectors that were
clustered. A dot is one distinct report with its labels; its area is the number of studies that have it.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

POINTS = 1500  # dots at most: the layout of more takes minutes in one thread
COLOURS = (
    "#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377",
    "#e08040", "#44aa99", "#7755bb", "#999933", "#cc6699", "#55779a",
)  # fmt: skip
OTHER, NOISE = "#8a95a5", "#cdd3da"  # smaller clusters; reports like no other
INK, MUTED = "#222831", "#6b7683"
LABELS = 14  # bars at most

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def draw(
    features: Floats,
    clusters: Ints,
    before: Ints,
    after: Ints,
    largest: Sequence[tuple[str, int, int]],
    labels: Mapping[str, tuple[int, int]],
    samples: int,
    title: str,
) -> bytes:
    """Draw the picture as a PNG.

    Per dot: vector, cluster (0 is the largest, -1 noise), studies before and after; per large cluster: (terms, studies,
    studies kept); per label: (studies before, after); `samples` is all training studies.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 9.2), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        2, 12, height_ratios=(1.35, 1), left=0.03, right=0.975, top=0.86, bottom=0.04, hspace=0.16, wspace=0.3
    )
    figure.text(0.03, 0.955, title, fontsize=17, weight="bold", color=INK)
    figure.text(
        0.03, 0.92,
        "Each dot is a distinct report, its area the number of studies that have it; near dots say alike. "
        "Grey: smaller clusters. Pale: like no other, all kept.",
        fontsize=10.5, color=MUTED,
    )  # fmt: skip
    places = _project(features)
    panels = figure.add_subplot(grid[0, :6]), figure.add_subplot(grid[0, 6:])
    for axes, count, name in zip(panels, (before, after), ("before", "after"), strict=True):
        _map(axes, places, clusters, count.astype(float), float(before.max()), min(len(largest), len(COLOURS)))
        axes.set_title(name, loc="left", fontsize=12, color=INK, pad=6)
    _names(figure.add_subplot(grid[1, :6]), largest[: len(COLOURS)])
    _bars(figure.add_subplot(grid[1, 8:]), labels, samples)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _project(features: Floats) -> Floats:
    """Project the vectors onto a plane: (n, 2)."""
    if len(features) < 10 or not features.std():
        return np.asarray(np.pad(features, ((0, 0), (0, 2)))[:, :2], np.float64)
    from sklearn.manifold import TSNE  # type: ignore[import-untyped]

    perplexity = min(30.0, (len(features) - 1) / 3)
    start = "pca" if features.shape[1] > 1 else "random"
    method = TSNE(perplexity=perplexity, init=start, max_iter=400, random_state=0, n_jobs=1)
    return np.asarray(method.fit_transform(features.astype(np.float32)), np.float64)


def _map(axes: Any, places: Floats, clusters: Ints, count: Floats, most: float, named: int) -> None:
    for spine in axes.spines.values():
        spine.set_color("#e3e7eb")
    axes.set(xticks=[], yticks=[], xlim=_limits(places[:, 0]), ylim=_limits(places[:, 1]))
    area = 7 + 500 * count / max(most, 50.0)
    visible = count > 0
    layers = [(visible & (clusters < 0), NOISE, 0.75), (visible & (clusters >= named), OTHER, 0.55)]
    layers += [(visible & (clusters == number), COLOURS[number], 0.8) for number in range(named)]
    for chosen, colour, alpha in layers:
        axes.scatter(*places[chosen].T, s=area[chosen], c=colour, alpha=alpha, linewidths=0)
    for number in range(named):
        own = clusters == number
        if own.any():
            middle = places[own][np.argmin(np.abs(places[own] - np.median(places[own], axis=0)).sum(1))]
            axes.annotate(
                str(number + 1), middle, (9, 9), textcoords="offset points", fontsize=8, weight="bold", color="white",
                ha="center", va="center",
                bbox={"boxstyle": "circle,pad=0.22", "fc": COLOURS[number], "ec": "white", "lw": 1.2},
            )  # fmt: skip


def _limits(values: Floats) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    room = 0.04 * (high - low) or 1.0
    return low - room, high + room


def _names(axes: Any, largest: Sequence[tuple[str, int, int]]) -> None:
    """List the largest clusters, numbered as in the maps."""
    axes.axis("off")
    axes.set(xlim=(0, 1), ylim=(len(COLOURS) + 0.5, -0.5))
    axes.set_title("largest clusters: studies before and after", loc="left", fontsize=12, color=INK, pad=6)
    if not largest:
        axes.text(0, 1, "none: every report is like no other", fontsize=10.5, color=MUTED)
    for place, (terms, samples, kept) in enumerate(largest):
        axes.text(
            0.015, place + 0.5, str(place + 1), fontsize=8, weight="bold", color="white", ha="center", va="center",
            bbox={"boxstyle": "circle,pad=0.22", "fc": COLOURS[place], "ec": "none"},
        )  # fmt: skip
        words = terms if len(terms) <= 62 else terms[:61] + "…"
        axes.text(0.05, place + 0.5, words or "(no words in common)", fontsize=10, color=INK, va="center")
        axes.text(0.9, place + 0.5, f"{samples:,}", fontsize=10, color=MUTED, va="center", ha="right")
        axes.text(0.99, place + 0.5, f"{kept:,}", fontsize=10, weight="bold", color=INK, va="center", ha="right")


def _bars(axes: Any, labels: Mapping[str, tuple[int, int]], samples: int) -> None:
    """Draw the counts of the most frequent labels."""
    for side in ("top", "right", "bottom", "left"):
        axes.spines[side].set_visible(False)
    shown = sorted(labels.items(), key=lambda item: (-item[1][0], item[0]))[:LABELS]
    more = f" ({LABELS} of {len(labels)})" if len(labels) > LABELS else ""
    axes.set_title(f"labels: studies before and after{more}", loc="left", fontsize=12, color=INK, pad=6)
    axes.set(xticks=[], yticks=[])
    if not shown:
        axes.text(0, 0.9, "the studies have no labels", fontsize=10.5, color=MUTED, transform=axes.transAxes)
        return
    rows = np.arange(len(shown))
    earlier, later = (np.array([counts[n] for _, counts in shown]) for n in (0, 1))
    axes.barh(rows, earlier, height=0.78, color="#dfe4ea")
    axes.barh(rows, later, height=0.78, color="#4477aa")
    axes.set_yticks(rows, [name if len(name) <= 30 else name[:29] + "…" for name, _ in shown], fontsize=9.5, color=INK)
    axes.tick_params(length=0)
    axes.set(ylim=(max(len(shown), 6) - 0.4, -0.6), xlim=(0, earlier.max() * 1.3))
    for row, (a, b) in enumerate(zip(earlier, later, strict=True)):
        axes.text(a + earlier.max() * 0.015, row, f"{a:,} → {b:,}", fontsize=9, color=MUTED, va="center")
