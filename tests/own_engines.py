"""The engines that every installation has: others need a package, and are tested with stand-ins of it."""

from lib_subquad import Settings
from lib_subquad.engines import order
from lib_subquad.plan import candidates

OWN = [engine.NAME for engine in order.engines() if not hasattr(engine, "installed")]


def able(problem):
    """The names of those that *automatic* may take for a problem, the first of them first."""
    return [engine.NAME for engine in candidates(problem, Settings()) if not engine.why_not(problem)]
