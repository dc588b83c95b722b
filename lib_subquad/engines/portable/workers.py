"""Threads that share a call on the CPU: one for each of PyTorch's own, each on pieces of its own.

PyTorch's threads meet at a barrier after every operator and spin there. Where another program has taken one of the
cores they all wait for the one that does not run: beside one busy program on two cores a call took 2.5 times as long,
beside twelve ten times. Ours compute whole pieces with one thread of PyTorch's each, and meet once, at the end.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ... import device as devices

Piece = TypeVar("Piece")

# A main thread that waits for a lock does not hear Ctrl-C on Windows: it looks up now and then.
SECONDS_TO_CTRL_C = 0.2

# Multiplications of a thread, some 50 ms, below which barriers are the lesser evil: after an operator PyTorch's threads
# spin for another 3 to 5 ms (libgomp's GOMP_SPINCOUNT), on the very cores that ours begin on.
LEAST = 1 << 31

# Modes and profilers of PyTorch see what their own thread does, and no other. Private; without them nothing watches.
_DISPATCH_MODES = getattr(torch._C, "_len_torch_dispatch_stack", int)
_FUNCTION_MODES = getattr(torch._C, "_len_torch_function_stack", int)
_is_profiled = getattr(torch._C._autograd, "_profiler_enabled", bool)


def share(pieces: Iterable[Piece], compute: Callable[[Iterator[Piece]], None], workers: int) -> None:
    """Call compute(pieces) in so many threads, each with an iterator that gives every piece to one of them only.

    With one worker the calling thread does it. Inference mode is as it is there; gradients and autocast are off. A
    thread that ends early leaves the rest to the others.

    Raises:
        BaseException: the first error of any of them, once all have stopped; the rest of the pieces is left.
    """
    if workers == 1:
        return compute(iter(pieces))
    shared = _Shared(pieces)
    inference = torch.is_inference_mode_enabled()

    def work() -> None:
        try:
            with torch.inference_mode(inference), torch.no_grad():
                compute(shared)
        except BaseException as error:
            shared.stop(error)

    futures: list[concurrent.futures.Future[None]] = []
    try:
        _submit(work, workers, futures)
        if not futures:
            compute(shared)
        _wait(futures)
    except BaseException:  # Ctrl-C
        shared.stop()
        _wait(futures)
        raise
    if shared.error is not None:
        try:
            raise shared.error
        finally:
            shared.error = None  # its traceback holds this frame, and so itself and every tensor in it


class _Shared(Generic[Piece]):
    """An iterator for several threads; it ends early when one of them could not go on."""

    def __init__(self, pieces: Iterable[Piece]) -> None:
        self._pieces, self._lock = iter(pieces), threading.Lock()
        self._stopped = False
        self.error: BaseException | None = None

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        with self._lock:
            if self._stopped:
                raise StopIteration
            return next(self._pieces)

    def stop(self, error: BaseException | None = None) -> None:
        with self._lock:
            self._stopped = True
            self.error = self.error or error


def _submit(work: Callable[[], None], count: int, futures: list[concurrent.futures.Future[None]]) -> None:
    """Have it done so many times, or less often where the system has no room for a thread, or is on its way out."""
    with contextlib.suppress(RuntimeError):
        threads = _pool(count)
        for _ in range(count):
            futures.append(threads.submit(work))


def _wait(futures: list[concurrent.futures.Future[None]]) -> None:
    while concurrent.futures.wait(futures, SECONDS_TO_CTRL_C).not_done:
        pass


# ------------------------------------------------------------------------------------------------------------ the pool

_lock = threading.Lock()
_threads: concurrent.futures.ThreadPoolExecutor | None = None
_size = 0


def available(query: Tensor, key: Tensor, value: Tensor) -> int:
    """How many threads can share a call here and now; 1 where only the calling one can, or had better, do it.

    PyTorch must keep a number of threads for each of ours (with OpenMP it does; that of its own thread pool is the
    whole process's), and nothing may watch what the calling thread does.
    """
    threads = devices.threads(query.device)
    if threads == 1 or not _EACH_ITS_OWN or _is_watched(query, key, value):
        return 1
    multiplications = query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])
    return threads if multiplications >= LEAST * threads else 1


_EACH_ITS_OWN = "ATen parallel backend: OpenMP" in torch.__config__.parallel_info()


def _is_watched(*tensors: Tensor) -> bool:
    modes = _DISPATCH_MODES() or _FUNCTION_MODES() or _is_profiled()
    return bool(modes) or any(type(tensor) is not Tensor for tensor in tensors)


def _pool(size: int) -> concurrent.futures.ThreadPoolExecutor:
    """At least so many threads, that last as long as the process."""
    global _threads, _size
    with _lock:
        if _threads is None or size > _size:
            if _threads is not None:
                _threads.shutdown(wait=False)
            _threads, _size = _started(size), size
        return _threads


def _started(size: int) -> concurrent.futures.ThreadPoolExecutor:
    """Threads with one of PyTorch's each.

    torch.set_num_threads also sets what threads that are made later begin with: that is put back at once.
    """
    before = _in_a_new_thread(torch.get_num_threads)
    threads, together = concurrent.futures.ThreadPoolExecutor(size, "subquad"), threading.Barrier(size)

    def begin() -> None:
        torch.get_num_threads()  # the first question in a thread sets its number
        torch.set_num_threads(1)
        together.wait()

    try:
        for future in [threads.submit(begin) for _ in range(size)]:
            future.result()
    except BaseException:
        together.abort()
        threads.shutdown(wait=False)
        raise
    finally:
        try:
            _in_a_new_thread(torch.set_num_threads, before)
        except RuntimeError:  # there is no room for one
            torch.set_num_threads(before)
    return threads


def _in_a_new_thread(function: Callable[..., Any], *args: int) -> Any:
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        return thread.submit(function, *args).result()


def _forget() -> None:
    """A process that was forked has none of its parent's threads."""
    global _lock, _threads, _size
    _lock, _threads, _size = threading.Lock(), None, 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
