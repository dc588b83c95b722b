"""Pictures of what the Lab measured: time against peak memory, the best trade-offs marked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ... import device as devices
from .exploration import Exploration
from .trials import Trial

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZE_INCHES = (8, 4.8)


def draw(exploration: Exploration) -> Figure:
    """A matplotlib figure of an exploration: every setting that was compared a point, the Pareto front a line, today's
    setting, the recommended one and the memory limit labelled; what was only tried once is paler, as it was measured
    otherwise."""
    from matplotlib.figure import Figure  # no pyplot: it keeps figures, and the web UI has threads
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=SIZE_INCHES, dpi=100, layout="constrained")
    axes = figure.add_subplot()
    compared = [trial for trial in exploration.trials if trial.rounds]
    once = [trial for trial in (*exploration.trials, *exploration.tried) if not trial.rounds]
    styles: tuple[dict[str, Any], ...] = ({"s": 28, "color": "#9aa5b1"}, {"s": 16, "color": "#d5dae0"})
    for trials, words, how in (
        (compared, f"measured in {exploration.rounds} rounds", styles[0]),
        (once, "tried once", styles[1]),
    ):
        if trials:
            axes.scatter(*_points(trials), label=words, zorder=2, **how)
    front = exploration.pareto_front()
    if front:
        axes.plot(*_points(front), "o-", color="#2563eb", label="less memory than anything faster", zorder=3)
    for words, trial, marker, size, color in (
        ("today", exploration.today(), "s", 150, "#b45309"),
        ("recommended", exploration.recommended(), "o", 220, "#15803d"),
    ):
        if trial is not None:
            label = f"{words}: {trial.label}"
            how = {"marker": marker, "s": size, "edgecolors": color, "facecolors": "none"}
            axes.scatter(*_points([trial]), linewidths=2.5, label=label, zorder=4, **how)
    limit = exploration.limit_bytes / devices.MIB
    highest = max((trial.peak_bytes for trial in (*compared, *once)), default=0) / devices.MIB
    if limit <= highest * 2:
        axes.axhline(limit, color="#dc2626", linestyle="--", label="memory limit")
    axes.set(
        xlabel="attention in one sampling step, milliseconds (left is faster)",
        ylabel="peak workspace, MiB (low is small)",
        yscale="log",
    )
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.margins(0.12)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=2, fontsize="small", frameon=False)
    return figure


def _points(trials: list[Trial]) -> tuple[list[float], list[float]]:
    return [trial.seconds * 1e3 for trial in trials], [trial.peak_bytes / devices.MIB for trial in trials]
