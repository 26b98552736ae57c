"""The book's one plot style, and the plots that more than one lesson draws."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd

from lab.load import Load
from lab.watch import Watch

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


def availability(runs: Mapping[str, tuple[Load, Watch]], colors: Mapping[str, str], title: str) -> plt.Figure:
    """One strip per run: a tick per request, coloured by the version that answered or by its failure.

    New connections and kept-alive ones have a lane each; above them stand the SIGTERMs and the changes of endpoints.

    Args:
        runs: By name, the load and the watch around it.
        colors: The colour of each version.
        title: What the figure shows.
    """
    figure, axes = plt.subplots(len(runs), 1, figsize=(WIDTH, 1.35 * len(runs) + 0.9), sharex=True, squeeze=False)
    longest = max(load.requests["start"].max() - load.requests["start"].min() for load, _ in runs.values())
    tick = 0.04 / longest * 72 * WIDTH * 0.75
    for axis, (name, (load, watch)) in zip(axes[:, 0], runs.items(), strict=True):
        requests = load.requests
        for lane, kept in enumerate((True, False)):
            mine = requests[requests["keep_alive"] == kept]
            at = mine["start"] - load.begin
            for version, color in colors.items():
                axis.vlines(at[mine["ok"] & (mine["version"] == version)], lane + 0.12, lane + 0.72, color=color, lw=tick)
            axis.vlines(at[~mine["ok"]], lane - 0.02, lane + 0.86, color=COLORS["black"], lw=max(1.6, tick))
        sigterms = [one - load.begin for one in watch.pods["sigterm"].dropna().unique() if one > load.begin]
        changes = [one - load.begin for one in watch.capacity["time"] if load.begin < one < requests["start"].max()]
        axis.plot(changes, [2.25] * len(changes), "|", color=COLORS["grey"], ms=9, mew=1.6, clip_on=False, in_layout=False)
        axis.plot(sigterms, [2.25] * len(sigterms), "v", color=COLORS["red"], ms=7, clip_on=False, in_layout=False)
        failed = int((~requests["ok"]).sum())
        axis.set_title(name, fontsize=10.5, pad=5)
        verdict = f"{failed} of {len(requests)} lost" if failed else f"none of {len(requests)} lost"
        axis.set_title(verdict, loc="right", fontsize=10.5, pad=5, color=COLORS["red"] if failed else COLORS["green"])
        axis.set_ylim(-0.1, 2.5)
        axis.set_yticks([0.42, 1.42], ["kept alive", "new connection"])
        axis.tick_params(axis="y", length=0)
        axis.grid(visible=False)
        axis.spines["left"].set_visible(False)
    axes[-1, 0].set_xlabel("seconds since the change")
    handles = [plt.Line2D([], [], color=color, lw=5, label=f"answered by {version}") for version, color in colors.items()]
    handles += [
        plt.Line2D([], [], color=COLORS["black"], lw=5, label="lost"),
        plt.Line2D([], [], color=COLORS["grey"], marker="|", ls="", mew=1.6, ms=9, label="endpoints change"),
        plt.Line2D([], [], color=COLORS["red"], marker="v", ls="", ms=7, label="SIGTERM"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), handlelength=0.8, columnspacing=1.4)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    return figure


def capacity(
    load: Load, watch: Watch, service: str, phases: Mapping[str, tuple[float, float]], title: str, *, want: int, columns: int = 2
) -> plt.Figure:
    """One panel per phase of a run: how many endpoints of a Service are ready, second by second, and the requests that were lost.

    Args:
        load: The load.
        watch: The watch around it.
        service: The Service's name.
        phases: By name, begin and end (Unix seconds).
        title: What the figure shows.
        want: The number of replicas asked for, drawn as a line.
        columns: Panels side by side.
    """
    rows = -(-len(phases) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(WIDTH, 1.8 * rows + 0.8), sharex=True, sharey=True, squeeze=False)
    steps = watch.capacity.query("service == @service")
    lost = load.requests.query("not ok")["start"]
    for axis, (name, (begin, end)) in zip(axes.flat, phases.items(), strict=False):
        before, during = steps[steps["time"] <= begin], steps[steps["time"].between(begin, end, inclusive="right")]
        at = [-0.5, *(during["time"] - begin), end - begin + 0.5]
        ready = [before["ready"].iloc[-1], *during["ready"], (during if len(during) else before)["ready"].iloc[-1]]
        axis.fill_between(at, ready, step="post", color=COLORS["sky"], alpha=0.45, lw=0)
        axis.step(at, ready, where="post", color=COLORS["blue"], lw=1.8)
        axis.axhline(want, color=COLORS["grey"], ls=":", lw=1.2)
        mine = lost[lost.between(begin, end)] - begin
        axis.vlines(mine, 0, 0.12 * want, color=COLORS["black"], lw=1.4)
        axis.set_title(name, fontsize=10.5, pad=4)
        axis.set_title(f"{end - begin:.1f} s, {len(mine) or 'none'} lost", loc="right", fontsize=10.5, fontweight="normal", pad=4)
        axis.set_ylim(0, max(1.2 * want, axis.get_ylim()[1], max(ready) + 0.3))
        axis.yaxis.get_major_locator().set_params(integer=True)
    for axis in axes.flat[len(phases) :]:
        axis.set_visible(False)
    figure.supylabel("ready endpoints", fontsize=10.5)
    figure.supxlabel("seconds since it began; black at the foot: a request lost", fontsize=10.5)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    return figure


def lives(load: Load, watch: Watch, service: str, colors: Mapping[str, str], title: str) -> plt.Figure:
    """One bar per Pod of a Service: starting, ready, terminating but serving, and its SIGTERM.

    Args:
        load: The load around it: its block's begin is second 0.
        watch: What was recorded.
        service: The Service's name.
        colors: The colour of each version, the image's tag.
        title: What the figure shows.
    """
    endpoints, pods = watch.endpoints.query("service == @service"), watch.pods
    pods = pods[pods["pod"].isin(endpoints["pod"])]
    last = max(load.end, pods["time"].max())
    marks = pd.DataFrame({"born": pods.groupby("pod")["time"].min(), "left": endpoints.query("terminating").groupby("pod")["time"].min()})
    order = marks.assign(new=marks["born"] > load.begin).sort_values(["new", "left", "born"]).index
    figure, axis = plt.subplots(figsize=(WIDTH, 0.42 * len(order) + 1.5))
    for row, name in enumerate(order):
        mine, told = pods[pods["pod"] == name], endpoints[endpoints["pod"] == name]
        color = colors[mine["image"].iloc[0].rpartition(":")[2]]
        gone = mine[mine["event"] == "DELETED"]["time"]
        born, end = mine["time"].min(), gone.iloc[0] if len(gone) else last
        ready, leaving = told[told["ready"]]["time"].min(), told[told["terminating"]]["time"].min()
        stop = end if pd.isna(leaving) else leaving
        for begin, until, style in (
            (born, ready, {"color": "#D9D9D9"}),
            (ready, stop, {"color": color}),
            (stop, end, {"facecolor": "white", "edgecolor": color, "hatch": "////", "lw": 1.2}),
        ):
            axis.barh(row, until - begin, left=begin - load.begin, height=0.62, **style)
        for sigterm in mine["sigterm"].dropna().unique():
            axis.plot(sigterm - load.begin, row, "v", color=COLORS["red"], ms=8)
    axis.set_yticks(range(len(order)), [f"…{name[-5:]}" for name in order], family="monospace")
    axis.invert_yaxis()
    axis.set_xlim(-1, last - load.begin)
    axis.set_ylabel("Pod")
    axis.set_xlabel("seconds since the change")
    axis.set_title(title)
    handles = [mpl.patches.Patch(color="#D9D9D9", label="not ready yet")]
    handles += [mpl.patches.Patch(color=color, label=f"ready, {version}") for version, color in colors.items()]
    handles += [
        mpl.patches.Patch(facecolor="white", edgecolor=COLORS["grey"], hatch="////", label="terminating, still serving"),
        plt.Line2D([], [], color=COLORS["red"], marker="v", ls="", ms=8, label="SIGTERM"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), handlelength=1.2, columnspacing=1.2)
    return figure


def lanes(
    watch: Watch,
    lanes: Mapping[str, str],
    events: Mapping[str, float],
    title: str,
    *,
    label: str = "lane",
    begin: float | None = None,
    end: float | None = None,
) -> plt.Figure:
    """One lane per value of a label, one bar per Pod in it: not ready, ready, being ended; ✓ or ✗ where it ran to its end.

    A Pod that comes back under its old name has its old row again; otherwise the first row that is free.

    Args:
        watch: What was recorded.
        lanes: By value of the label, the name of the lane, topmost first.
        events: By name, when something was done (Unix seconds): a vertical line each.
        title: What the figure shows.
        label: The label's key.
        begin: Second 0 (Unix seconds); without it, the first event.
        end: Where the figure ends (Unix seconds); without it, shortly after the last change.
    """
    pods = watch.pods.assign(lane=lambda frame: frame["labels"].map(lambda labels: labels.get(label)))
    pods = pods[pods["lane"].isin(list(lanes))].sort_values("time", kind="stable")
    pods["life"] = pods["pod"] + " " + (pods["event"] == "ADDED").groupby(pods["pod"]).cumsum().astype(str)
    begin = min(events.values()) if begin is None else begin
    end = pods["time"].max() * 1.02 - begin * 0.02 if end is None else end
    rows: dict[str, list[tuple[str, float]]] = {lane: [] for lane in lanes}
    bars = []
    for _, changes in pods.groupby("life", sort=False):
        lane, name, born = changes[["lane", "pod", "time"]].iloc[0]
        over = changes[(changes["event"] == "DELETED") | changes["phase"].isin(["Succeeded", "Failed"])]
        gone = over["time"].iloc[0] if len(over) else end
        if gone < begin or born > end:
            continue
        mine = rows[lane]
        row = next((n for n, (had, _) in enumerate(mine) if had == name), None)
        row = next((n for n, (_, free) in enumerate(mine) if free <= born), len(mine)) if row is None else row
        mine[row : row + 1] = [(name, gone)]
        at = [*changes["time"], end]
        ending, ready = changes["deleted"].notna(), changes["ready"]
        states = pd.Series("starting", changes.index).mask(ready, "ready").mask(ending, "ending")
        turns = [n for n in range(len(states)) if n == 0 or states.iloc[n] != states.iloc[n - 1]]
        for turn, after in zip(turns, [*turns[1:], len(states)], strict=True):
            start, stop = max(at[turn], begin), min(at[after], gone, end)
            if start < stop:
                bars.append((lane, row, start, stop, states.iloc[turn]))
        if len(over) and over["event"].iloc[0] != "DELETED" and over["deleted"].isna().iloc[0] and gone <= end:
            bars.append((lane, row, gone, gone, over["phase"].iloc[0]))
    height = {lane: max(1, len(mine)) for lane, mine in rows.items()}
    top = dict(zip(lanes, [sum(list(height.values())[:n]) + 0.9 * n for n in range(len(lanes))], strict=True))
    total = sum(height.values()) + 0.9 * len(lanes)
    figure, axis = plt.subplots(figsize=(WIDTH, 0.17 * total + 1.5))
    color = dict(
        zip(lanes, [COLORS[name] for name in ("grey", "purple", "sky", "blue", "green", "orange", "red", "black")] * 3, strict=False)
    )
    for lane, row, start, stop, state in bars:
        styles = {
            "starting": {"color": "#D9D9D9"},
            "ready": {"color": color[lane]},
            "ending": {"facecolor": "white", "edgecolor": color[lane], "hatch": "/////", "lw": 1},
        }
        if state in styles:
            axis.barh(top[lane] + row, stop - start, left=start - begin, height=0.76, **styles[state])
        else:
            mark, shade = ("✓", COLORS["green"]) if state == "Succeeded" else ("✗", COLORS["red"])
            axis.text(
                start - begin + 0.004 * (end - begin), top[lane] + row, mark, color=shade, va="center", fontsize=11, fontweight="bold"
            )
    for at in events.values():
        axis.axvline(at - begin, color=COLORS["black"], lw=1, ls=":", zorder=0)
    upper = axis.secondary_xaxis("top")
    names = list(events)
    for n, (one, other) in enumerate(itertools.pairwise(events.values()), start=1):
        if other - one < 0.1 * (end - begin) and not names[n - 1].endswith("\n"):
            names[n] += "\n"
    upper.set_xticks([at - begin for at in events.values()], names)
    upper.tick_params(length=0)
    upper.spines["top"].set_visible(False)
    for lane in list(lanes)[1:]:
        axis.axhline(top[lane] - 0.95, color="#E5E5E5", lw=0.8, zorder=0)
    axis.set_yticks([top[lane] + (height[lane] - 1) / 2 for lane in lanes], list(lanes.values()))
    axis.tick_params(axis="y", length=0)
    axis.grid(visible=False)
    axis.set_ylim(total - 1.2, -0.9)
    axis.set_xlim(0, end - begin)
    axis.set_xlabel("seconds")
    axis.set_title(title, pad=26)
    drawn = {state for *_, state in bars}
    handles = [
        mpl.patches.Patch(color="#D9D9D9", label="not ready"),
        mpl.patches.Patch(color=COLORS["blue"], label="ready (lane's colour)"),
    ]
    if "ending" in drawn:
        handles.append(mpl.patches.Patch(facecolor="white", edgecolor=COLORS["blue"], hatch="/////", label="being ended"))
    for state, mark, shade in (("Succeeded", "$✓$", "green"), ("Failed", "$✗$", "red")):
        if state in drawn:
            handles.append(plt.Line2D([], [], color=COLORS[shade], marker=mark, ls="", ms=9, label=state.lower()))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), handlelength=1.2, columnspacing=1.2)
    return figure
