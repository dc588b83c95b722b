"""What `bench` and `growth` print when measuring is over."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from .. import tables
from .halves import CHECKED_SIDE, USUAL, WAYS
from .results import Result, find, geometric_mean

BASE_TOKENS = 4096  # what time per score is compared with: a 512² image in SD 1.5


def heading(record: Mapping[str, Any]) -> str:
    what = {
        "attention": "attention",
        "training": "forward and backward",
        "layer": "a whole CrossAttention layer",
        "vae": "Stable Diffusion's VAE",
    }
    parts = [what[record["mode"]], record["dtype"]]
    if record["scores"] != "normal":
        parts.append(f"{record['scores']} scores")
    if record.get("busy"):
        parts.append(f"beside {record['busy']} busy program{'s' * (record['busy'] > 1)}")
    threads = f", {record['threads']} thread{'s' * (record['threads'] > 1)}" if record["threads"] else ""
    return f"{', '.join(parts)}; {record['device']}{threads}, torch {record['torch']}"


def report(record: Mapping[str, Any], results: Sequence[Result], against: Sequence[str]) -> str:
    """Everything that `bench` prints when measuring is over."""
    lines = [heading(record), ""]
    lines.append(main_table(results, against))
    summary = summary_table(results, against)
    if summary:
        lines += ["", summary]
    lines += ["", _legend(record, results), "", f"`{record['command']}`"]
    return "\n".join(lines)


def main_table(results: Sequence[Result], against: Sequence[str]) -> str:
    notes = any(result.reason for result in results)
    gradients = any(result.gradient_error is not None for result in results)
    headings = ["shape", "peer", "time", "spread", *(f"× {name}" for name in against), "peak memory", "error"]
    headings += ["gradient error"] * gradients + ["note"] * notes
    rows, previous = [], None
    for result in results:
        row = [
            "" if result.shape == previous else result.shape.label,
            result.peer,
            tables.seconds(result.seconds),
            tables.spread(result.low, result.high),
            *(tables.ratio(result.ratio_to(find(results, result.shape, name))) for name in against),
            tables.memory(result.peak_bytes),
            tables.error(result.error),
        ]
        rows.append(row + [tables.error(result.gradient_error)] * gradients + [tables.short(result.reason)] * notes)
        previous = result.shape
    return tables.table(headings, rows, left={"shape", "peer", "note"})


def summary_table(results: Sequence[Result], against: Sequence[str]) -> str:
    """Over all shapes: the geometric mean and the worst of each peer's ratios; empty where there is but one shape."""
    if len({result.shape for result in results}) < 2:
        return ""
    headings, rows = ["all shapes"], []
    for name in against:
        headings += [f"× {name}, mean", "worst", f"memory × {name}, worst"]
    for peer in dict.fromkeys(result.peer for result in results):
        row = [peer]
        for name in against:
            pairs = [(one, find(results, one.shape, name)) for one in results if one.peer == peer]
            times = [ratio for one, two in pairs if (ratio := one.ratio_to(two)) is not None]
            memory = [ratio for one, two in pairs if (ratio := one.memory_ratio_to(two)) is not None]
            row += [tables.ratio(geometric_mean(times)), tables.ratio(max(times, default=None))]
            row.append(tables.ratio(max(memory, default=None)))
        rows.append(row)
    return tables.table(headings, rows, left={headings[0]})


def _legend(record: Mapping[str, Any], results: Sequence[Result]) -> str:
    return (
        f"{how_often(results)}ratios: medians of each round's own; peak memory: beside the inputs, result included; "
        f"error: the largest absolute one of a sample of rows against float64.{_once(results)}{busyness(record)}"
    )


def _once(results: Sequence[Result]) -> str:
    once = any(len(result.good) == 1 for result in results)
    return " What was measured once is not to be trusted: times change from one round to the next." if once else ""


def how_often(results: Sequence[Result]) -> str:
    """How many measurements stand behind the times, in words; empty where there are none."""
    counts = sorted(len(result.good) for result in results if result.good)
    if not counts:
        return ""
    many = f"{counts[0]} to {counts[-1]}" if counts[0] < counts[-1] else str(counts[0])
    again = sum(found.tries - 1 for result in results for found in result.good)
    calm = f" ({again} more were disturbed and made again)" if again else ""
    return f"time: median of {many} process{'es' * (counts[-1] > 1)}{calm}, spread: their least and most; "


def others(results: Sequence[Result]) -> list[float] | None:
    """The least, median and largest share of the processors that other programs took during a measurement."""
    shares = [found.others for result in results for found in result.good if found.others is not None]
    return [min(shares), statistics.median(shares), max(shares)] if shares else None


def busyness(record: Mapping[str, Any]) -> str:
    """What else the machine was doing, in words."""
    if record["threads"] is None or record["others"] is None:
        return ""
    least, median, most = (f"{share:.0%}" for share in record["others"])
    return (
        f" Other programs took {least} to {most} of the processors during a measurement ({median} in the median); load "
        f"average {record['load']} before, {record['load_after']} after."
    )


def vae_report(record: Mapping[str, Any], results: Sequence[Result]) -> str:
    """Everything that `bench --vae` prints."""
    ways = "; ".join(f"{way}: {words}" for way, words in WAYS.items() if any(it.peer == way for it in results))
    legend = (
        f"{ways}.\n\n{how_often(results)}ratios: medians of each round's own; processor: time of all threads together; "
        f"peak memory: beside weights and input, result included; error: the largest absolute one of a picture of at "
        f"most {CHECKED_SIDE}² against float64.{_once(results)}{busyness(record)}"
    )
    return "\n".join([heading(record), "", vae_table(results), "", legend, "", f"`{record['command']}`"])


def vae_table(results: Sequence[Result]) -> str:
    """Every way on every picture, beside the usual one where that was measured."""
    notes = any(result.reason for result in results)
    headings = ["half, picture", "way", "time", "spread", f"× {USUAL}", "processor", f"× {USUAL}"]
    headings += ["peak memory", f"× {USUAL}", "error", *["note"] * notes]
    rows, previous = [], None
    for result in results:
        usual = find(results, result.shape, USUAL)
        row = [
            "" if result.shape == previous else result.shape.label,
            result.peer,
            tables.seconds(result.seconds),
            tables.spread(result.low, result.high),
            tables.ratio(result.ratio_to(usual)),
            tables.seconds(result.processor),
            tables.ratio(result.processor_ratio_to(usual)),
            tables.memory(result.peak_bytes),
            tables.ratio(result.memory_ratio_to(usual)),
            tables.error(result.error),
        ]
        rows.append(row + [tables.short(result.reason)] * notes)
        previous = result.shape
    return tables.table(headings, rows, left={"half, picture", "way", "note"})


def growth_report(record: Mapping[str, Any], results: Sequence[Result]) -> str:
    """Everything that `growth` prints."""
    legend = f"{how_often(results)}workspace: beside inputs and result; planned: what the plan promised."
    lines = [heading(record), "", growth_table(results), "", legend + busyness(record), "", f"`{record['command']}`"]
    return "\n".join(lines)


def growth_table(results: Sequence[Result]) -> str:
    """Peer by peer, the tokens doubling."""
    notes = any(result.reason for result in results)
    headings = ["peer", "tokens", "time", "spread", "ns a score", f"beside {BASE_TOKENS}", "workspace", "planned"]
    rows = []
    for peer in dict.fromkeys(result.peer for result in results):
        found = [result for result in results if result.peer == peer]
        base = next((result for result in found if result.shape.queries == BASE_TOKENS), None)
        for result in found:
            first = result is found[0]
            planned = result.good[0].plan_bytes if result.good else None
            row = [
                peer if first else "",
                f"{result.shape.queries:,}",
                tables.seconds(result.seconds),
                tables.spread(result.low, result.high),
                _number(_nanoseconds(result)),
                _change(_nanoseconds(result), None if base is None else _nanoseconds(base)),
                tables.memory(result.workspace_bytes),
                tables.memory(planned),
            ]
            rows.append(row + [tables.short(result.reason)] * notes)
    return tables.table(headings + ["note"] * notes, rows, left={"peer", "note"})


def _nanoseconds(result: Result) -> float | None:
    return None if result.seconds is None else result.seconds / result.shape.scores * 1e9


def _number(value: float | None) -> str:
    return tables.NOTHING if value is None else f"{value:.3f}"


def _change(value: float | None, base: float | None) -> str:
    return tables.NOTHING if value is None or base is None else f"{(value / base - 1) * 100:+.0f} %"
