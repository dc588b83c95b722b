"""Pictures of the benchmark and of the growth run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

from ... import device as devices
from .results import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL_INCHES = (4.2, 3.6)
MARKERS = "oDs^vPX*<>"
MOST_COLUMNS = 3


def draw_bench(results: Sequence[Result], title: str) -> Figure:
    """A matplotlib figure: for every shape a panel, in it every peer's time against its peak memory."""
    from matplotlib.figure import Figure  # no pyplot: no window, no display needed

    shapes = list(dict.fromkeys(result.shape for result in results))
    columns = min(len(shapes), MOST_COLUMNS)
    rows = -(-len(shapes) // columns)
    figure = Figure(figsize=(PANEL_INCHES[0] * columns, PANEL_INCHES[1] * rows + 0.8), dpi=100, layout="constrained")
    figure.suptitle(title, fontsize="medium")
    peers = list(dict.fromkeys(result.peer for result in results))
    styles = dict(zip(peers, _styles()))
    handles: dict[str, Any] = {}
    for number, shape in enumerate(shapes):
        axes = figure.add_subplot(rows, columns, number + 1)
        for result in results:
            if result.shape != shape or result.peak_bytes is None:
                continue
            if result.seconds is None or result.low is None or result.high is None:
                continue
            low, high = result.seconds - result.low, result.high - result.seconds
            handles[result.peer] = axes.errorbar(
                result.seconds * 1e3,
                max(result.peak_bytes / devices.MIB, 0.1),  # a log axis has no zero
                xerr=[[low * 1e3], [high * 1e3]],
                linestyle="none",
                markersize=8,
                **styles[result.peer],
            )
        axes.set(title=shape.label, xscale="log", yscale="log")
        axes.set(xlabel="milliseconds (left is faster)", ylabel="peak memory, MiB (low is small)")
        axes.title.set_fontsize("small")
        _plain_numbers(axes)
    shown = [peer for peer in peers if peer in handles]
    figure.legend(
        [handles[peer] for peer in shown], shown, loc="outside lower center", ncols=4, fontsize="small", frameon=False
    )
    return figure


def draw_growth(results: Sequence[Result], title: str) -> Figure:
    """A matplotlib figure: workspace, and time per score, against the number of tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(PANEL_INCHES[0] * 2, PANEL_INCHES[1] + 0.8), dpi=100, layout="constrained")
    figure.suptitle(title, fontsize="medium")
    memory, time = figure.subplots(1, 2)
    peers = list(dict.fromkeys(result.peer for result in results))
    for peer, style in zip(peers, _styles()):
        found = [result for result in results if result.peer == peer]
        held = [(it.shape.queries, it.workspace_bytes / devices.MIB) for it in found if it.workspace_bytes is not None]
        took = [(it.shape.queries, it.seconds / it.shape.scores * 1e9) for it in found if it.seconds is not None]
        for axes, points in ((memory, held), (time, took)):
            axes.plot([tokens for tokens, _ in points], [value for _, value in points], label=peer, **style)
    for axes, words in ((memory, "workspace beside the result, MiB"), (time, "nanoseconds per score")):
        axes.set(xlabel="tokens", ylabel=words, xscale="log")
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.tick_params(axis="x", labelsize="small")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", frameon=False)
    return figure


def _styles() -> Iterator[dict[str, Any]]:
    return ({"color": f"C{number % 10}", "marker": marker} for number, marker in enumerate(cycle(MARKERS)))


def _plain_numbers(axes: Axes) -> None:
    from matplotlib.ticker import LogLocator

    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
    axes.margins(0.15)
    axes.tick_params(labelsize="small")
    axes.grid(alpha=0.3)
