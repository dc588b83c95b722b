"""The tool that tells whether measuring finds what is fastest."""

from __future__ import annotations

from lib_subquad.engines.table import Candidate, Found
from lib_subquad.lab.bench.shapes import parse_shape
from tools import grid


def measured(**seconds) -> grid.Grid:
    made = grid.Grid(parse_shape("1,2,64,64,8"), None)
    made.seconds = {Candidate(engine): taken for engine, taken in seconds.items()}
    return made


def test_what_is_chosen_by_one_half_of_the_rounds_is_judged_by_the_other():
    it = measured(rules=[1.0, 1.0] * 8, lucky=[0.5, 2.0] * 8)
    assert it.chosen() == Found("lucky", margin=2.0) and it.beside_the_best(it.chosen()) == 2.0
    assert it.beside_the_best(Found("rules")) == 1.0


def test_where_rounds_are_too_few_the_rules_decide():
    assert measured(rules=[1.0] * 4, other=[0.5] * 4).chosen() == Found("rules")


def test_it_runs(capsys):
    grid.main(["--shape", "1,2,64,64,8", "--rounds", "2", "--device", "cpu"])
    out = capsys.readouterr().out
    assert "2×64×8" in out and "Automatic measured for" in out
