"""The book's one plot style, and the plots that more than one lesson draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd

COLORS = {
    "blue": "#0072B2",
    "orange": "#E69F00",
    "green": "#009E73",
    "red": "#D55E00",
    "purple": "#CC79A7",
    "sky": "#56B4E9",
    "grey": "#6B6B6B",
    "black": "#1A1A1A",
}
"""Okabe and Ito's palette (https://jfly.uni-koeln.de/color/), told apart by colour-blind readers."""
WIDTH = 8.0
"""Inches; at the page's width a 10-point letter stays one."""


def style() -> None:
    """Set the style. `import lab` does it."""
    mpl.rcParams.update(
        {
            "figure.figsize": (WIDTH, 3.6),
            "figure.dpi": 110,
            "figure.facecolor": "white",
            "figure.constrained_layout.use": True,
            "savefig.facecolor": "white",
            "font.size": 10.5,
            "axes.titlesize": 12,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.labelsize": 10.5,
            "xtick.labelsize": 10,
            "ytick.labelsize": 10,
            "legend.fontsize": 10,
            "legend.frameon": False,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.25,
            "axes.axisbelow": True,
            "axes.prop_cycle": mpl.cycler(color=[COLORS[name] for name in ("blue", "orange", "green", "red", "purple", "sky")]),
        }
    )


def availability(runs: Mapping[str, dict], colors: Mapping[str, str], title: str) -> plt.Figure:
    """One strip per run: a tick per request, coloured by the version that answered or by its failure.

    Args:
        runs: By name: `requests` (the frame of `Load.requests`), `sigterms` and `endpoints` (Unix seconds, each), `begin` (Unix seconds).
        colors: The colour of each version.
        title: What the figure shows.
    """
    figure, axes = plt.subplots(len(runs), 1, figsize=(WIDTH, 1.35 * len(runs) + 0.8), sharex=True, squeeze=False)
    for axis, (name, run) in zip(axes[:, 0], runs.items(), strict=True):
        requests: pd.DataFrame = run["requests"]
        at = requests["start"] - run["begin"]
        for version, color in colors.items():
            axis.vlines(at[requests["ok"] & (requests["version"] == version)], 0, 0.55, color=color, lw=0.9)
        lost = at[~requests["ok"]]
        axis.vlines(lost, 0, 1.0, color=COLORS["black"], lw=1.1)
        axis.plot([moment - run["begin"] for moment in run["sigterms"]], [1.25] * len(run["sigterms"]), "v", color=COLORS["red"], ms=7)
        axis.plot(
            [moment - run["begin"] for moment in run["endpoints"]], [1.25] * len(run["endpoints"]), "|", color=COLORS["grey"], ms=9, mew=1.6
        )
        failed = int((~requests["ok"]).sum())
        axis.set_title(f"{name}: {failed} of {len(requests)} failed", fontsize=10.5, fontweight="normal", pad=3)
        axis.set_ylim(0, 1.5)
        axis.set_yticks([])
        axis.grid(visible=False)
        axis.spines["left"].set_visible(False)
    axes[-1, 0].set_xlabel("seconds since the rollout began")
    handles = [plt.Line2D([], [], color=color, lw=4, label=f"answered by {version}") for version, color in colors.items()]
    handles += [
        plt.Line2D([], [], color=COLORS["black"], lw=4, label="failed"),
        plt.Line2D([], [], color=COLORS["red"], marker="v", ls="", label="SIGTERM"),
        plt.Line2D([], [], color=COLORS["grey"], marker="|", ls="", mew=1.6, ms=9, label="endpoints change"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), handlelength=1.2, columnspacing=1.2)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    return figure


def direct_labels(axis: plt.Axes, lines: Sequence, pad: float = 4) -> None:
    """Write each line's label at its right end, in its colour, in place of a legend.

    Args:
        axis: The axes that hold the lines.
        lines: The lines, as `axis.plot` returns them.
        pad: Points between a line's end and its label.
    """
    for line in lines:
        x, y = line.get_data()
        axis.annotate(line.get_label(), (x[-1], y[-1]), xytext=(pad, 0), textcoords="offset points", va="center", color=line.get_color())
