"""Going on after an out-of-memory: smaller chunks for the rest of the call, and for the next calls of its kind."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

from . import console, memory, recorded, refusals, trust
from . import device as devices
from .engines import order
from .engines.base import UselessResult
from .engines.table import Found
from .plan import Plan, candidates, limit_bytes, measured, plan_problem, why_it_cannot, with_sizes
from .problem import Problem
from .settings import Settings

# Once a process: the fifty layers of a step tell the same story, and each image's infotext has it.
warn_once = cache(console.warn)

# What decides of a call; its finding among it, and no other: what is measured for other calls changes nothing here.
Decided = tuple[Problem, Settings, tuple[bool, ...], int, "Found | None"]
# Plans that were found to fit, and the free memory at which the planner's own had not. Entries are replaced whole, so
# that the thread which draws live previews needs no lock.
_remembered: dict[Decided, tuple[Plan, int]] = {}
# Where an engine's gradients are left to PyTorch, and to what it keeps for them.
_left_to_pytorch: set[tuple[str, Problem]] = set()
GROWN = 1.05  # free memory has grown when it is this much more than what did not suffice


def plan_for(problem: Problem, settings: Settings, free: int) -> Plan:
    """The plan for a call: what was found to fit last time, until free memory has grown or the limit is below it. Where
    gradients are wanted `free` is all that there is, which never grows."""
    key = _decided(problem, settings)
    found = _remembered.get(key)
    if found is not None:
        made, failed_at = found
        if free > failed_at * GROWN:
            _remembered.pop(key, None)
        elif not refusals.of(problem, made.engine) and made.workspace_bytes <= limit_bytes(problem, settings, free):
            return made
    return plan_problem(problem, settings, free)


def _decided(problem: Problem, settings: Settings) -> Decided:
    return problem, settings, devices.switches(), order.engine_changes(), measured(problem, settings)


def forget() -> None:
    """Forget every size that was found to fit, every refusal, that they were logged, and how much memory was free."""
    _remembered.clear()
    _left_to_pytorch.clear()
    refusals.forget()
    trust.forget()
    memory.forget()
    warn_once.cache_clear()


class Attempts:
    """A call that is tried again with smaller chunks as long as the device runs out of memory.

        while attempts.pending:
            with attempts.attempt():
                ...  # an out-of-memory in here halves attempts.plan and leaves it pending

    `plan` is the plan now in force, `refusals` the engines that gave way and why. `backward`: it is the recomputation
    of gradients that is tried. `watched`: somebody looks at what PyTorch keeps for the backward pass.
    """

    def __init__(self, problem: Problem, plan: Plan, settings: Settings, backward: bool = False) -> None:
        self.problem, self.plan, self.settings, self.backward = problem, plan, settings, backward
        self.pending = True
        self.refusals: tuple[tuple[str, str], ...] = ()
        self.watched = problem.grad and recorded.is_watched()

    @property
    def one_node(self) -> bool:
        """Whether the call is one node for PyTorch, which keeps the same of it whatever engine and sizes there were."""
        if not self.problem.grad or self.plan.keeps_scores:
            return False
        if not order.named(self.plan.engine).DIFFERENTIABLE:
            return True
        return self.watched and (self.plan.engine, self.problem) not in _left_to_pytorch

    def recompute(self) -> None:
        """Gradients are to come from an engine that recomputes them."""
        if order.named(self.plan.engine).DIFFERENTIABLE:
            self.plan = next_engine(self.problem, self.plan, self.settings, backward=True) or self.plan

    def leave_to_pytorch(self) -> None:
        """This engine's gradients of this problem are PyTorch's, with all that it keeps for them."""
        _left_to_pytorch.add((self.plan.engine, self.problem))

    @contextlib.contextmanager
    def attempt(self) -> Iterator[None]:
        """Raises what `smaller_after` does."""
        try:
            yield
            self.pending = False
            return
        except Exception as error:
            smaller = self.smaller_after(error)
        # Out of the except block the traceback is gone, and with it the tensors that its frames held.
        self.go_on(smaller)

    def smaller_after(self, error: Exception) -> Plan:
        """What to try after `error`, which is being handled: smaller sizes where memory ran out, the next engine where
        the kernel of this one refused or gave what is of no use.

        Raises:
            Exception: `error` itself when it is neither, when retrying is off, or when all has been tried; then with a
                line that says what.
        """
        useless = isinstance(error, UselessResult)
        refused, ran_out = useless or refusals.is_refusal(error), devices.is_out_of_memory(error)
        if (refused or ran_out) and self.problem.grad and not self.one_node and _is_computed_again():
            add_line(error, COMPUTED_AGAIN)
            raise error
        if refused:
            later = next_engine(self.problem, self.plan, self.settings, self.backward)
            if later is None:
                raise error
            reason = str(error) if useless else refusals.reason(self.plan.engine, error)
            if not useless:
                self.refusals += ((self.plan.engine, reason),)
            reasons = (*_without_retry(self.plan.reasons), reason)
            return replace(later, reasons=reasons, reruns=self.plan.reruns + useless)
        if not (self.settings.retry and ran_out):
            raise error
        smaller = halved(self.problem, self.plan, self.settings, self.backward)
        if smaller is None:
            self._say_what_was_tried(error)
            raise error
        return smaller

    def go_on(self, smaller: Plan) -> None:
        """Take that plan, for this call and the next ones of its kind."""
        ran_out = smaller.retries > self.plan.retries
        if smaller.reruns > self.plan.reruns:
            warn_once(f"[subquad] {smaller.reasons[-1]}. Such calls are computed again, exactly")
        self.plan = smaller
        if ran_out:
            devices.release_cached(self.problem.device)
            warn_once("[subquad] out of memory: going on with smaller chunks")
            memory.forget()
            free = memory.reading(self.problem.device, self.problem.grad).bytes
            if not self.plan.reruns:  # another call may come to the other engine, whose sizes are its own
                _remembered[_decided(self.problem, self.settings)] = (replace(self.plan, retries=0), free)
        memory.forget()  # a call that is known, or was planned meanwhile, is planned anew with what was found

    def remember_refusals(self) -> None:
        """The call is done: what an engine refused, another one did. A call that none can do, because of a hook of the
        user's or of tensors that are not like others of their sizes, says nothing of the engines."""
        for engine, reason in self.refusals:
            refusals.remember(self.problem, engine, reason)
        if self.refusals:
            memory.forget()  # a call that was planned meanwhile is planned anew

    def _say_what_was_tried(self, error: Exception) -> None:
        line = (
            f"subquad halved its chunks {self.plan.retries} times, down to {self.plan.query_chunk} queries x "
            f"{self.plan.kv_chunk} keys of one head; not even that fits"
        )
        add_line(error, line)


def add_line(error: Exception, line: str) -> None:
    """Another line in what `error` says."""
    first = str(error.args[0]) if error.args else type(error).__name__
    error.args = (f"{first}\n{line}", *error.args[1:])


def _is_computed_again() -> bool:
    """Whether `torch.utils.checkpoint` (use_reentrant=False) runs a block for the second time, and expects that what
    PyTorch keeps of it is what it kept the first time. Private; where it does not tell, PyTorch's own error has to do.
    """
    hooks = recorded.hooks() if recorded.hooks is not None else None
    return hooks is not None and getattr(hooks[0], "__qualname__", "").startswith("_recomputation_hook")


COMPUTED_AGAIN = (
    "subquad cannot go on in smaller chunks here: torch.utils.checkpoint computes this block again, and other tensors "
    "would be kept than the first time. Leave checkpointing to 'automatic', or set smaller chunks"
)


class Chunks(Attempts):
    """The query chunks of a call, as slices; one that runs out of memory comes again in smaller pieces.

    They end early, still pending, when the call becomes one node for PyTorch, or no longer is one: that holds for a
    whole call only. `records` are the nodes of the chunks within that one, where PyTorch made them.

    for rows in chunks:
        with chunks.attempt():
            ...  # results of earlier chunks stay
    """

    def __iter__(self) -> Iterator[slice]:
        start, one_node = 0, self.one_node
        self.records: list[recorded.Record] = []
        while start < self.problem.queries and self.one_node == one_node:
            stop = min(start + self._rows_at_once, self.problem.queries)
            self.pending = True
            yield slice(start, stop)
            if not self.pending:
                start = stop

    @property
    def _rows_at_once(self) -> int:
        if self.plan.keeps_scores:
            return self.plan.query_chunk
        return order.named(self.plan.engine).rows_at_once(self.problem, self.plan.sizes)


def halved(problem: Problem, plan: Plan, settings: Settings, backward: bool = False) -> Plan | None:
    """The plan with smaller sizes, or with the next engine where this one has none; None when all has been tried.

    Scores that were to be kept are recomputed first. What PyTorch recorded of an engine has the sizes that it has.
    """
    engine = order.named(plan.engine)
    if backward and engine.DIFFERENTIABLE:
        sizes = None
    else:
        sizes = plan.sizes._replace(heads=1) if plan.keeps_scores else engine.smaller(problem, plan.sizes)
    smaller = (
        next_engine(problem, plan, settings, backward) if sizes is None else with_sizes(problem, plan, engine, sizes)
    )
    if smaller is None:
        return None
    return replace(smaller, retries=plan.retries + 1, reasons=(*_without_retry(plan.reasons), RETRY_REASON))


def next_engine(problem: Problem, plan: Plan, settings: Settings, backward: bool = False) -> Plan | None:
    """The plan with the exact engine after its own, by what the user wants, that can do the problem; in the backward
    pass with one that recomputes gradients. None where there is none."""
    engines, current = candidates(problem, settings), order.named(plan.engine)
    if current in engines and not (backward and current.DIFFERENTIABLE):  # where it was measured it may be no more
        engines = engines[engines.index(current) + 1 :]
    for engine in engines:
        if engine is current or backward and engine.DIFFERENTIABLE:
            continue
        if engine.EXACT and not (engine.why_not(problem) if backward else why_it_cannot(engine, problem)):
            return with_sizes(problem, plan, engine, engine.taking_over(problem, plan.sizes))
    return None


RETRY_REASON = "smaller chunks after an out-of-memory"


def _without_retry(reasons: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(reason for reason in reasons if reason != RETRY_REASON)
