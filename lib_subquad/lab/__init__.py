"""The Attention Lab and the benchmark: measure, recommend, plot."""
