"""The report's plots, each as a PNG."""

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

import numpy as np

from lorafleet.eval.results import Score
from lorafleet.eval.statistics import Comparison, Estimate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI: Final = 120
COLOURS: Final = ("#6b7a90", "#24508f", "#c0532f", "#3d8b5f", "#8a5aa8", "#b8912b", "#2f8f9d", "#a33a5b")


def forest(against: Mapping[str, Comparison], title: str) -> bytes:
    """Each system's change with its interval, a line at none."""
    figure = _figure(9, 1.2 + 0.45 * len(against))
    axes = figure.subplots()
    for row, comparison in enumerate(against.values()):
        found = comparison.difference
        colour = COLOURS[0] if not comparison.is_evidence else COLOURS[3] if found.mean > 0 else COLOURS[2]
        ends = np.clip([found.low, found.high], found.mean - 1e3, found.mean + 1e3)
        axes.plot(ends, [row, row], color=colour, linewidth=2)
        axes.plot(found.mean, row, "o", color=colour)
    axes.axvline(0, color="#999", linewidth=1)
    axes.set_yticks(range(len(against)), list(against))
    axes.set_ylim(len(against) - 0.5, -0.5)
    axes.set_xlabel(title)
    axes.grid(axis="x", alpha=0.3)
    return _png(figure)


def categories(estimates: Mapping[str, Mapping[str, Estimate]], title: str) -> bytes:
    """Bars of every category, one for each system, with intervals."""
    names = list(next(iter(estimates.values())))
    figure = _figure(min(16.0, 3 + 0.45 * len(names) * len(estimates)), 3.4)
    axes = figure.subplots()
    width = 0.8 / len(estimates)
    for number, (system, found) in enumerate(estimates.items()):
        means = np.array([found[name].mean for name in names])
        ends = np.array([[found[name].low, found[name].high] for name in names])
        spread = np.nan_to_num(np.abs(ends - means[:, None]).T, posinf=0.0)
        places = np.arange(len(names)) + (number - (len(estimates) - 1) / 2) * width
        colour = COLOURS[number % len(COLOURS)]
        axes.bar(places, means, width * 0.92, yerr=spread, color=colour, label=system, error_kw={"linewidth": 1})
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel(title)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.18), ncols=4, frameon=False)
    return _png(figure)


def sweep(points: Sequence[tuple[float, Score]], title: str, label: str, baseline: str, level: float) -> bytes:
    """The score against an adapter's weight, with its band, and a line at the baseline's."""
    figure = _figure(7, 3.2)
    axes = figure.subplots()
    weights = [weight for weight, _ in points]
    axes.plot(weights, [score.mean for _, score in points], marker="o", color=COLOURS[1], label=label)
    lows, highs = ([score.low for _, score in points], [score.high for _, score in points])
    axes.fill_between(weights, lows, highs, alpha=0.15, color=COLOURS[1])  # type: ignore[arg-type]
    axes.axhline(level, color=COLOURS[0], linewidth=1, linestyle="--", label=baseline)
    axes.set_xlabel("adapter weight")
    axes.set_ylabel(title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return _png(figure)


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", dpi=DPI)


def _png(figure: "Figure") -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()
