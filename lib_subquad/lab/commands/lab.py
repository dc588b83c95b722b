"""python -m lib_subquad lab: measure engines and chunk sizes on a checkpoint's shapes, and recommend the best."""

from __future__ import annotations

import argparse
from typing import Any

from ...console import UserError
from ...engines import order
from .. import tables
from ..explain.question import Question
from ..explain.words import engine_in_words
from ..tune.exploration import Exploration
from ..tune.picture import draw
from ..tune.trials import TUNED, Trial
from . import files, kept, question
from .arguments import positive

BAR = "{l_bar}{bar}| [{elapsed}{postfix}]"  # not with its own estimate: the exploration's knows what is to come


def add_arguments(parser: argparse.ArgumentParser) -> None:
    question.add_arguments(parser)
    parser.add_argument(
        "--verify",
        type=positive,
        metavar="N",
        help="measure the recommended setting and Automatic N more times, in turn, and compare them "
        "(default: not again)",
    )
    files.add_arguments(parser)
    kept.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    files.check(arguments)
    why_not = kept.why_not(arguments)
    if why_not and arguments.table is not None:
        raise UserError(why_not)
    kept.load(arguments)
    asked = question.read(arguments)
    if why_not:
        print(f"What is measured will not be kept: {why_not}.")
    exploration = Exploration(asked.rows(), asked.settings, asked.device, asked.free_bytes)
    stopped = _measure(exploration)
    disturbed = exploration.disturbance().sentence(past=True)
    if not exploration.trials:
        print(
            "Stopped before a first setting was measured." if stopped else "Nothing could be measured: out of memory."
        )
        return 130 if stopped else 1
    try:  # files first: who reads only the first lines closes the pipe
        files.save(arguments, _as_json(asked, exploration), lambda: draw(exploration))
    finally:
        print(tables.for_reading(_table_rows(exploration), left={"Setting", ""}))
        engine = engine_in_words(asked.settings.engine, exploration.rows)
        print("\n" + "\n".join([*_conclusions(exploration), *engine, *[disturbed] * bool(disturbed), *asked.notes]))
    found = exploration.found()
    if found and not why_not:
        print(kept.add(arguments, order.machine(asked.device), found))
    if arguments.verify and not stopped:
        try:
            print(_verified(exploration, arguments.verify))
        except KeyboardInterrupt:
            return 130
    return 130 if stopped else 0


def _table_rows(exploration: Exploration) -> list[dict[str, str]]:
    """What was compared, the fastest first; then what was only tried once, which is no comparison."""
    return [
        {
            "Setting": trial.label,
            "Attention a step": tables.seconds(trial.seconds),
            "Measured": f"{trial.repeats} times" if trial.rounds else "once",
            "Peak workspace": tables.memory(trial.peak_bytes),
            "": ", ".join(_marks(trial, exploration)),
        }
        for trials in (exploration.trials, exploration.tried)
        for trial in sorted(trials, key=lambda trial: trial.seconds)
    ]


def _marks(trial: Trial, exploration: Exploration) -> list[str]:
    recommended, today = exploration.recommended(), exploration.today()
    marks = [word for word, other in (("recommended", recommended), ("given", today)) if other is trial]
    marks += ["Pareto front"] * any(trial is other for other in exploration.pareto_front())
    return marks + exploration.remarks(trial)


def _conclusions(exploration: Exploration) -> list[str]:
    recommended = exploration.recommended()
    if recommended is None:
        return ["Nothing is recommended: it ended before settings were compared."]
    settings = ", ".join(f"{name} {getattr(recommended.settings, name)}" for name in TUNED)
    nothing = ": nothing is clearly faster" if recommended is exploration.automatic() else ""
    found = [f"Recommended: {settings}{nothing}"]
    if undecided := exploration.undecided():
        labels = ", ".join(trial.label for trial in undecided)
        why = "The machine was too busy to tell" if exploration.complete else "It ended before it was clear"
        found.append(f"{why} whether these are faster: {labels}.")
    return found


def _measure(exploration: Exploration) -> bool:
    """Measure with a progress bar; whether Ctrl-C stopped it. What was measured until then is kept."""
    try:
        from tqdm import tqdm
    except ImportError:
        tqdm = None
    bar = None
    try:
        for step in exploration.run():
            left = "" if step.seconds_left is None else f", {tables.duration(step.seconds_left)} left"
            if tqdm is None:
                print(f"{step.done / step.total:.0%}: {step.what}{left}")
                continue
            if bar is None:
                bar = tqdm(total=step.total, bar_format=BAR)
            bar.n = step.done
            bar.set_postfix_str(step.what + left)
        if bar is not None:
            bar.n = bar.total
    except KeyboardInterrupt:
        return True
    finally:
        if bar is not None:
            bar.close()
    return False


def _verified(exploration: Exploration, repeats: int) -> str:
    """How the recommended setting does beside Automatic in measurements that had no part in choosing it."""
    recommended, automatic = exploration.recommended(), exploration.automatic()
    if recommended is None or automatic is None:
        return "Nothing was compared with Automatic: there is nothing to measure again."
    if recommended is automatic:
        return "Automatic itself is recommended: there is nothing to compare."
    again, beside = exploration.measured_again((recommended.settings, automatic.settings), repeats)
    if again is None or beside is None:
        measured = ((recommended, again), (automatic, beside))
        gone = " and ".join(was.label for was, now in measured if now is None)
        return f"Measuring again ran out of memory with {gone}: there is nothing to compare."
    return (
        f"Measured again, {repeats} times in turn: {again.seconds / beside.seconds:.3f} of Automatic's time, "
        f"peak {tables.memory(again.peak_bytes)} of {tables.memory(exploration.limit_bytes)} allowed"
    )


def _as_json(asked: Question, exploration: Exploration) -> dict[str, Any]:
    front, recommended = exploration.pareto_front(), exploration.recommended()
    return {
        "family": asked.checkpoint.family,
        "size": [asked.width, asked.height],
        "batch": asked.batch,
        "device": str(asked.device),
        "dtype": str(asked.dtype).removeprefix("torch."),
        "limit_bytes": exploration.limit_bytes,
        "trials": [
            {name: getattr(trial.settings, name) for name in TUNED}
            | {
                "computed": trial.computed,
                "seconds": trial.seconds,
                "repeats": trial.repeats,
                "peak_bytes": trial.peak_bytes,
                "fits": trial.fits,
                "pareto": any(trial is other for other in front),
                "recommended": trial is recommended,
            }
            for trial in (*exploration.trials, *exploration.tried)
        ],
        "undecided": [trial.label for trial in exploration.undecided()],
    }
