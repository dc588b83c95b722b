"""Ways to compute attention, measured side by side, each time in a process of its own."""
