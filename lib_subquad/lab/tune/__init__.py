"""Measure engines and chunk sizes on a question's own attention shapes, and recommend the best setting."""
