"""Attention as models call it: their layers and functions, written on attention(). They know no web UI."""
