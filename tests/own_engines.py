"""The engines that every installation has: others need a package, and are tested with stand-ins of it."""

from lib_subquad.engines import order

OWN = [engine.NAME for engine in order.engines() if not hasattr(engine, "installed")]
