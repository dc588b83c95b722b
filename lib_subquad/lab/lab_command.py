"""python -m lib_subquad lab: measure engines and chunk sizes on a checkpoint's shapes, and recommend the best."""

from __future__ import annotations

import argparse

from . import cli, question
from .explain import megabytes
from .explore import TUNED, Exploration
from .plan_command import table

BAR_WITHOUT_ESTIMATE = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    question.add_arguments(parser)
    parser.add_argument(
        "--verify",
        type=cli.positive,
        metavar="N",
        help="measure the recommended setting and Automatic N more times, in turn, and compare them "
        "(default: not again)",
    )
    cli.add_output_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    if arguments.plot:
        cli.need("matplotlib", "--plot")
    asked = question.read(arguments)
    exploration = Exploration(asked.rows(), asked.settings, asked.device)
    stopped = _measure(exploration)
    if not exploration.trials:
        print("Stopped before a first setting was measured.")
        return 130
    recommended, today = exploration.recommended(), exploration.today()
    front = exploration.pareto_front()
    rows = []
    for trial in sorted(exploration.trials, key=lambda trial: trial.seconds):
        marks = [word for word, other in (("recommended", recommended), ("given", today)) if other is trial]
        marks += ["Pareto front"] * (trial in front) + ["over the memory limit"] * (not trial.fits)
        rows.append(
            {
                "Setting": trial.label,
                "Attention a step": f"{trial.seconds * 1e3:.1f} ms",
                "Peak workspace": megabytes(trial.peak_bytes),
                "": ", ".join(marks),
            }
        )
    print(table(rows))
    print(f"\nRecommended: {', '.join(f'{name} {getattr(recommended.settings, name)}' for name in TUNED)}")
    if arguments.json:
        cli.write_json(arguments.json, _as_json(asked, exploration))
    if arguments.plot:
        from .picture import draw

        draw(exploration).savefig(arguments.plot)
    if arguments.verify and not stopped:
        try:
            print(_verified(exploration, arguments.verify))
        except KeyboardInterrupt:
            return 130
    return 130 if stopped else 0


def _measure(exploration: Exploration) -> bool:
    """Measure with a progress bar; whether Ctrl-C stopped it. What was measured until then is kept.

    How long it still takes is told once: by the exploration where it knows, else by the bar.
    """
    try:
        from tqdm import tqdm
    except ImportError:
        tqdm = None
    bar = None
    try:
        for step in exploration.run():
            left = "" if step.seconds_left is None else f", {step.seconds_left:.0f} s left"
            if tqdm is None:
                print(f"{step.done} of {step.total}: {step.what}{left}")
                continue
            if bar is None or bar.total != step.total:
                bar = tqdm(total=step.total, unit="call") if bar is None else _restart(bar, step.total)
            bar.n = step.done
            bar.bar_format = BAR_WITHOUT_ESTIMATE if left else None
            bar.set_postfix_str(step.what + left)
    except KeyboardInterrupt:
        return True
    finally:
        if bar is not None:
            bar.close()
    return False


def _verified(exploration: Exploration, repeats: int) -> str:
    """How the recommended setting does beside Automatic in measurements that had no part in choosing it."""
    recommended, automatic = exploration.recommended(), exploration.automatic()
    if automatic is None:
        return "Automatic could not be measured: there is nothing to compare with."
    if recommended is automatic:
        return "Automatic itself is recommended: there is nothing to compare."
    chosen = recommended.settings, automatic.settings
    recommended, automatic = exploration.measured_again(chosen, repeats)
    return (
        f"Measured again, {repeats} times in turn: {recommended.seconds / automatic.seconds:.3f} of Automatic's time, "
        f"peak {megabytes(recommended.peak_bytes)} of {megabytes(exploration.limit_bytes)} allowed"
    )


def _restart(bar, total: int):
    bar.reset(total=total)
    return bar


def _as_json(asked: question.Question, exploration: Exploration) -> dict:
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
                "seconds": trial.seconds,
                "peak_bytes": trial.peak_bytes,
                "fits": trial.fits,
                "pareto": trial in front,
                "recommended": trial is recommended,
            }
            for trial in exploration.trials
        ],
    }
