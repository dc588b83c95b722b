"""The Attention Lab: `explain` plans, `tune` measures settings, `bench` measures ways to compute attention, `survey`
looks at the device; `commands` is the command line to all four."""
