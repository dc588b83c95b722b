"""The commands of `python -m lib_subquad`, a module each, and what several of them ask and print."""
