"""Choices that are known only once scripts have been loaded."""


def cross_attention_optimizations() -> list[str]:
    """What the user can pick for attention."""
    from modules import sd_hijack

    return ["Automatic", *(optimizer.title() for optimizer in sd_hijack.optimizers), "None"]
