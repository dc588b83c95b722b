"""Programs for development, each run as `python -m tools.NAME --help`. CONTRIBUTING.md says when."""
