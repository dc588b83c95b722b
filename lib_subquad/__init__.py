"""Sub-quadratic attention: exact, in chunks, inside a memory limit. Needs nothing but torch."""

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
__version__ = "1.0.0"
