"""The Attention Lab: `explain` plans, `tune` measures settings, `bench` measures ways to compute attention; `commands`
is the command line to all three."""
