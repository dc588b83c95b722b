"""Sub-quadratic attention: exact, in chunks, inside a memory limit. Needs nothing but torch."""

import sys

try:
    import torch  # noqa: F401 - before ours, so that what is said of it is said once
except ModuleNotFoundError as error:
    on_the_command_line = sys.argv[:1] == ["-m"] and {__name__, f"-m{__name__}"} & set(sys.orig_argv)
    if error.name != "torch" or not on_the_command_line:
        raise
    sys.exit(
        f"lib_subquad needs PyTorch (torch), which {sys.executable} does not have: start it with a Python that does"
    )

from .attention import attention
from .calls import forget
from .dropin import efficient_dot_product_attention, efficient_dot_product_attention_of_transposed_keys, sdpa
from .plan import Plan, plan
from .settings import Settings

__all__ = [
    "Plan",
    "Settings",
    "attention",
    "efficient_dot_product_attention",
    "efficient_dot_product_attention_of_transposed_keys",
    "forget",
    "plan",
    "sdpa",
]
__version__ = "1.1.0"
