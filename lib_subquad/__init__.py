"""Sub-quadratic attention: exact, in chunks, inside a memory limit. Needs nothing but torch."""

from .attention import attention
from .calls import forget
from .dropin import efficient_dot_product_attention
from .plan import Plan, plan
from .settings import Settings

__all__ = ["Plan", "Settings", "attention", "efficient_dot_product_attention", "forget", "plan"]
__version__ = "1.0.0"
