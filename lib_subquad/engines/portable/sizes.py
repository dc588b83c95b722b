"""How much the portable engine scores at a time, and what that takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch

from ... import device as devices
from ...problem import Problem, item_bytes
from ...settings import Settings
from ..base import Sizes, call_bytes, half, overruled

# One row of one head by this many keys is the least that is ever tried.
SMALLEST_KV_CHUNK = 64
# Query chunks shrink to this before key chunks do: fewer rows leave the matrix units idle.
SMALLEST_FAST_QUERY_CHUNK = 256
# Heads of a tile, where there are queries enough.
FEWEST_HEADS = 2
# Rows of a piece that is made smaller only so that no thread ends before the others.
FEWEST_ROWS = 64

# Calls are short if so many entries fit a tile. On one thread of a CPU groups of 17 took 0.65 to 0.9 of the processor
# time that they took entry by entry, of 13 0.9 to 1.13, and of three to seven 1.1 to 1.5 times as much: what operators
# leave for one another was no longer in the caches.
SHORT = 16
# The most heads of a tile: grids of kernels take no more (PyTorch #142228).
MOST_HEADS = 65535

# A batch entry and some of its heads, or some entries and a head of theirs: either way a view of three dimensions.
Group = tuple[int | slice, int | slice]
Piece = tuple[Group, slice]  # and some of their rows


def fitting(problem: Problem, settings: Settings, limit: int) -> tuple[Sizes, list[str]]:
    chosen, reasons = _preferred(problem, settings), []
    for fits, why in (
        (lambda tried: _device_allows(problem, tried), "the largest tensor this device can hold"),
        (lambda tried: workspace_bytes(problem, tried) <= limit, "the memory limit"),
    ):
        before = chosen
        chosen = _shrink(chosen, _fewest_heads(problem), fits)
        if settings.query_chunk and chosen.queries < before.queries:
            reasons.append(overruled("query", before.queries, chosen.queries, why))
        if settings.kv_chunk and chosen.keys < before.keys:
            reasons.append(overruled("key/value", before.keys, chosen.keys, why))
        if not fits(chosen):
            reasons.append(f"even the smallest chunks exceed {why}")
    return chosen, reasons


def smaller(problem: Problem, sizes: Sizes) -> Sizes | None:
    """Half as many of several entries' heads, or one head with the larger chunk halved; None when one row by the
    smallest key chunk has been tried."""
    if sizes.heads > problem.heads > 0:
        return sizes._replace(heads=half(sizes.heads, problem.heads))
    smallest_keys = min(SMALLEST_KV_CHUNK, problem.keys)
    queries, keys, _ = sizes
    if keys > smallest_keys and (keys >= queries or queries == 1):
        return Sizes(queries, half(keys, smallest_keys), 1)
    return Sizes(queries // 2, keys, 1) if queries > 1 else None


def taking_over(problem: Problem, sizes: Sizes) -> Sizes:
    return Sizes(sizes.queries, min(sizes.keys, devices.rules(problem.device).kv_tile), 1)


def least_bytes(problem: Problem, settings: Settings) -> int:
    least = _preferred(problem, Settings(), least=True)
    asked = least._replace(  # of several chunks one result stays beside the next
        queries=min(least.queries, settings.query_chunk or least.queries),
        keys=min(least.keys, settings.kv_chunk or least.keys),
    )
    return max(workspace_bytes(problem, tried) for tried in {least, asked})


def rows_at_once(problem: Problem, sizes: Sizes) -> int:
    """All, where threads share them: they meet once, at the end."""
    return problem.queries if devices.rules(problem.device).threads_share else sizes.queries


def workspace_bytes(problem: Problem, sizes: Sizes) -> int:
    if devices.rules(problem.device).threads_share:
        threads, each = shares(problem.batch, problem.heads, problem.queries, sizes, devices.threads(problem.device))
        total = max(piece_bytes(problem, sizes), threads * piece_bytes(problem, each, threads))
    else:
        total = call_bytes(
            problem, sizes.queries, lambda queries: _attend_bytes(problem, sizes._replace(queries=queries))
        )
    if problem.grad:  # the statistics of all queries
        total += problem.batch * problem.heads * problem.queries * 2 * item_bytes(devices.compute_dtype(problem.dtype))
    return total


def shares(batch: int, heads: int, queries: int, sizes: Sizes, threads: int) -> tuple[int, Sizes]:
    """How many threads share a tile of these sizes, and what each of them scores at a time: heads where there are
    enough, rows otherwise; and so many rows that every thread has the same number of tiles, where that leaves enough.
    """
    threads = max(min(threads, sizes.heads * sizes.queries), 1)
    # Of many entries all are shared out; of a few heads no thread has more than was planned.
    each_heads = math.ceil(sizes.heads / threads) if sizes.heads > heads else max(sizes.heads // threads, 1)
    each = sizes._replace(heads=each_heads)
    if sizes.heads < threads:
        each = each._replace(queries=math.ceil(sizes.queries * sizes.heads / threads))
    groups = _groups(batch, heads, each.heads)
    fewest = math.ceil(queries / max(each.queries, 1))
    even = next(count for count in range(max(fewest, 1), fewest + threads + 1) if groups * count % threads == 0)
    if threads > 1 and queries >= even * FEWEST_ROWS:
        each = each._replace(queries=min(each.queries, math.ceil(queries / even)))
    return threads, each


def pieces(batch: int, heads: int, queries: int, sizes: Sizes) -> list[Piece]:
    """Groups of heads, and of each some rows."""
    return [
        (group, rows) for group in head_groups(batch, heads, sizes.heads) for rows in slices(queries, sizes.queries)
    ]


def head_groups(batch: int, heads: int, size: int) -> Iterator[Group]:
    """Indices of groups of at most `size` heads; a group stays a view, and so is never several heads of several
    entries: where it is more than an entry has, it is one head of so many entries."""
    if size > heads:
        for head in range(heads):
            for entries in slices(batch, size):
                yield entries, head
        return
    for entry in range(batch):
        for group in slices(heads, size):
            yield entry, group


def sides(batch: int, heads: int, size: int) -> tuple[int, int]:
    """Of how many heads groups of at most `size` are cut, and how often there are so many."""
    return (batch, heads) if size > heads else (heads, batch)


def _groups(batch: int, heads: int, size: int) -> int:
    beside, times = sides(batch, heads, size)
    return times * math.ceil(beside / max(size, 1))


def slices(count: int, size: int) -> Iterator[slice]:
    """0 to count in slices of at most `size`."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def kept_bytes(problem: Problem, sizes: Sizes) -> int:
    """What a call and its backward pass hold where PyTorch itself keeps scores in between, beside output and gradients.

    All weights, with a mask before and after rows that may attend to nothing are cleared, and the scaled queries; what
    one chunk makes of its scores, or their gradients; for every chunk the keys and values that were converted; and with
    several chunks the gradient of all queries that each has by itself, and a copy of the output's gradient.
    """
    item = item_bytes(devices.compute_dtype(problem.dtype))
    heads = problem.batch * problem.heads
    row = heads * problem.keys * item
    masked = problem.mask is not None
    converted = problem.dtype != devices.compute_dtype(problem.dtype)
    chunk = min(sizes.queries, problem.queries)
    chunks = math.ceil(problem.queries / chunk)
    keys = row * (problem.width + problem.value_width) * converted
    queries = heads * problem.queries * problem.width
    slices = queries * item_bytes(problem.dtype) + problem.output_bytes if chunks > 1 else 0
    scores = row * (problem.queries * (1 + masked) + chunk * (2 - masked))
    return scores + queries * item + chunks * keys + slices


def _attend_bytes(problem: Problem, sizes: Sizes) -> int:
    """Of one query chunk, its result included."""
    compute = devices.compute_dtype(problem.dtype)
    chunk = problem.batch * problem.heads * sizes.queries
    result = chunk * (problem.value_width * item_bytes(problem.value_dtype) + 2 * problem.grad * item_bytes(compute))
    return piece_bytes(problem, sizes) + result


def piece_bytes(problem: Problem, sizes: Sizes, threads: int = 1) -> int:
    """Of a thread, one of so many, that computes piece after piece of these sizes."""
    queries, keys, heads = sizes
    compute = devices.compute_dtype(problem.dtype)
    # What a group of heads has held stays until the next group has its own: so many heads beside those at work.
    beside, times = sides(problem.batch, problem.heads, heads)
    others = min(heads, beside - heads if beside > heads or times == 1 else heads)
    if devices.rules(problem.device).threads_share and (queries < problem.queries or threads > 1):
        count = _groups(problem.batch, problem.heads, heads) * math.ceil(problem.queries / max(queries, 1))
        others = heads if count > threads else 0
    contiguous = devices.rules(problem.device).contiguous
    converted = problem.dtype != compute or contiguous
    added = problem.mask is not None and problem.mask_dtype != torch.bool  # the query is scaled before its product
    query = problem.width if converted or added else 0
    sums = problem.value_width + 2  # of weighted values; and the maximum and the sum of weights
    scaling = heads * (query + problem.width * (converted and added)) + others * (query + sums)
    folding = heads * (query + sums + 2) + others * sums
    key = problem.width if converted else 0
    value = problem.value_width if problem.value_dtype != compute or contiguous else 0
    both = min(2 * keys, problem.keys)  # the keys and values of a part stay until the next part's are converted
    part = heads * both * (key + value) * item_bytes(compute)
    if problem.mask is not None and problem.mask_dtype != compute:  # a bool mask is inverted, a float mask converted
        mask_batch, mask_heads, mask_rows, mask_keys = problem.mask
        its_heads = mask_batch if heads > problem.heads else mask_heads
        tile = min(its_heads, heads) * min(mask_rows, queries) * min(mask_keys, keys)
        part += tile * (1 if problem.mask_dtype == torch.bool else item_bytes(compute))
    row = queries * item_bytes(compute)
    return heads * keys * row + max(scaling * row, folding * row + part)


def _preferred(problem: Problem, settings: Settings, least: bool = False) -> Sizes:
    """The user's sizes, and for those left automatic the ones that fill the device's tile, or its least one."""
    scores = devices.tile_bytes(problem.device, least) // item_bytes(devices.compute_dtype(problem.dtype))
    keys = min(settings.kv_chunk or devices.rules(problem.device).kv_tile, problem.keys)
    fewest = _fewest_heads(problem)
    heads = max(min(fewest, problem.heads), 1)  # an empty batch has none, and there may be no queries
    rows = max(min(settings.query_chunk or _multiple_of_64(scores // (keys * heads)), problem.queries), 1)
    heads = max(heads, min(problem.heads, scores // (keys * rows)))
    if not least and (many := _heads_of_entries(problem, scores, keys, rows)):
        return Sizes(rows, keys, many)
    # Threads take whole heads: a group that is no multiple leaves one of them idle.
    heads = max(heads // fewest * fewest, min(fewest, problem.heads), 1)
    return Sizes(rows, keys, heads)


def _heads_of_entries(problem: Problem, numbers: int, keys: int, rows: int) -> int:
    """How many entries' heads are to be one group, where an entry has so few and short ones that starting operators
    takes longer than what they compute; 0 where it has enough."""
    row = max(keys, problem.width + problem.value_width)  # of short calls, scores are not the most
    room, an_entry = numbers // (row * rows), problem.heads * devices.threads(problem.device)
    many = min(problem.batch, room, MOST_HEADS)
    if rows < problem.queries or many <= an_entry or room < SHORT * an_entry:
        return 0
    return math.ceil(problem.batch / math.ceil(problem.batch / many))


def _fewest_heads(problem: Problem) -> int:
    return devices.threads(problem.device) if devices.rules(problem.device).threads_share else FEWEST_HEADS


def _shrink(sizes: Sizes, fewest_heads: int, fits: Callable[[Sizes], bool]) -> Sizes:
    """Smaller sizes until they fit: heads and queries as far as they stay fast, then one head, keys, queries."""
    for field, least in (
        ("heads", fewest_heads),
        ("queries", SMALLEST_FAST_QUERY_CHUNK),
        ("heads", 1),
        ("keys", SMALLEST_KV_CHUNK),
        ("queries", 1),
    ):
        while not fits(sizes) and getattr(sizes, field) > least:
            sizes = sizes._replace(**{field: half(getattr(sizes, field), least)})
    return sizes


def _device_allows(problem: Problem, sizes: Sizes) -> bool:
    rules = devices.rules(problem.device)
    rows = max(sizes.keys, problem.width, problem.value_width)
    elements = sizes.heads * max(sizes.queries * rows, sizes.keys * max(problem.width, problem.value_width))
    if rules.largest_elements is not None and elements > rules.largest_elements:
        return False
    bytes_ = elements * item_bytes(devices.compute_dtype(problem.dtype))
    return rules.largest_bytes is None or bytes_ <= rules.largest_bytes


def _multiple_of_64(size: int) -> int:
    return max(size // 64 * 64, 1)
