"""Plots of metrics; needs matplotlib, `pip install 'bertgen_tf[plot]'`."""

import math
import os
from collections.abc import Sequence

import numpy as np

from bertgen_tf.metrics import scores, significance

MAX_BINS = 8
MIN_EXAMPLES = 15  # per bin, but a few examples have
FEW_BINS, FEW_EXAMPLES = 4, 5
MIN_RANGE = 10  # of percent, so that equal values do not look different
MAX_DOTS = 200  # examples that are also shown one by one
_RESAMPLES = 300  # per bin
_COLOURS = ("#1f5fa8", "#8a8a8a")
_TITLES = {
    "exact": "exact match",
    "sari": "SARI",
    "sari_f1": "SARI, F1 of deletions",
    "bleu": "BLEU",
    "chrf": "chrF",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "rougeLsum": "ROUGE-Lsum",
}


def length_bins(lengths: Sequence[int]) -> list[np.ndarray]:
    """Bins of examples of similar length, about equally many in each.

    Args:
        lengths: of the examples [n].

    Returns:
        the indices of each bin, from short to long; examples of one length share a bin.
    """
    lengths = np.asarray(lengths)
    few = min(FEW_BINS, len(lengths) // FEW_EXAMPLES)
    count = max(1, few, min(MAX_BINS, len(lengths) // MIN_EXAMPLES))
    edges = np.unique(np.sort(lengths)[np.arange(1, count) * len(lengths) // count])
    places = np.searchsorted(edges, lengths, side="right")
    return [np.flatnonzero(places == place) for place in np.unique(places)]


def source_lengths(sources: Sequence[str]) -> tuple[np.ndarray, str]:
    """Lengths [n] and their unit: words, or characters where there are no spaces between words."""
    words = np.array([len(source.split()) for source in sources])
    characters = np.array([len(source) for source in sources])
    if characters.sum() > 20 * words.sum():
        return characters, "characters"
    return words, "words"


def plot_by_length(
    systems: Sequence[dict[str, scores.MetricResult]],
    names: Sequence[str],
    sources: Sequence[str],
    path: str | os.PathLike,
) -> None:
    """Draws each metric against the length of the source, with 95% bootstrap intervals.

    Up to `MAX_DOTS` examples are also shown each, where the metric has values for them.

    Args:
        systems: one or two results of `metrics.compute`, of the same metrics and examples.
        names: what the legend calls the systems.
        sources: the texts [n] whose lengths count.
        path: the file to write; its extension decides the format.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        # Not pyplot, which would look for a display.
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError(
            "a plot needs the package matplotlib: pip install 'bertgen_tf[plot]'"
        ) from error
    lengths, unit = source_lengths(sources)
    few = len(lengths) <= MAX_DOTS
    width = max(np.ptp(lengths), 1)
    bins = length_bins(lengths)
    centres = np.array([lengths[examples].mean() for examples in bins])
    kinds = list(systems[0])
    columns = 2 if len(kinds) == 4 else min(3, len(kinds))
    rows = math.ceil(len(kinds) / columns)
    figure = Figure(figsize=(0.6 + 3.2 * columns, 1.1 + 2.3 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True).flatten()
    for system, (results, colour) in enumerate(zip(systems, _COLOURS, strict=False)):
        parts = [scores.subset(results, examples) for examples in bins]
        intervals = [significance.bootstrap(part, resamples=_RESAMPLES) for part in parts]
        # Side by side, so that neither hides the other's bars.
        shift = 0.012 * width * (system - (len(systems) - 1) / 2)
        for kind, axis in zip(kinds, axes, strict=False):
            values = np.array([part[kind].value for part in parts])
            low = values - [interval[kind].low for interval in intervals]
            high = [interval[kind].high for interval in intervals] - values
            if few and results[kind].examples is not None:
                axis.plot(
                    lengths + shift,
                    results[kind].examples,
                    color=colour,
                    marker="o",
                    markersize=3.5,
                    markeredgewidth=0,
                    linestyle="none",
                    alpha=0.35,
                )
            axis.errorbar(
                centres + shift,
                values,
                yerr=np.maximum(0, [low, high]),
                color=colour,
                marker="o",
                markersize=4,
                linewidth=1.5,
                elinewidth=1,
                capsize=2.5,
                label=names[system],
            )
            axis.axhline(results[kind].value, color=colour, linewidth=0.8, linestyle=":")
    for kind, axis in zip(kinds, axes, strict=False):
        values = " / ".join(f"{results[kind].value:.1f}" for results in systems)
        axis.set_title(f"{_TITLES[kind]}: {values}", fontsize=10, loc="left")
        axis.set_xlim(lengths.min() - 0.05 * width, lengths.max() + 0.05 * width)
        axis.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        bottom, top = axis.get_ylim()
        room = max(0, MIN_RANGE - (top - bottom)) / 2
        bottom, top = bottom - room, top + room
        margin = 0.03 * (top - bottom)  # room for the points at 0 and 100
        axis.set_ylim(max(bottom, -margin), min(top, 100 + margin))
    for axis in axes[len(kinds) :]:
        axis.set_visible(False)
    for index in range(len(kinds)):
        if index + columns >= len(kinds):
            axes[index].tick_params(labelbottom=True)
            axes[index].set_xlabel(f"{unit} of the source", fontsize=9)
        if index % columns == 0:
            axes[index].set_ylabel("percent", fontsize=9)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper left", ncols=len(labels), fontsize=9, frameon=False
    )
    sizes = [len(examples) for examples in bins]
    size = f"{min(sizes)} to {max(sizes)}" if min(sizes) < max(sizes) else f"{sizes[0]}"
    notes = [
        f"{len(lengths):,} examples, {size} per point",
        "bars: 95% bootstrap intervals",
        "dotted, and above: all examples",
    ]
    if few:
        notes.append("pale: one example each")
    figure.supxlabel(
        "; ".join(notes),
        fontsize=8,
        color="#555555",
    )
    figure.savefig(path, dpi=150)
