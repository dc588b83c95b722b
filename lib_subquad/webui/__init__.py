"""The web UI's side: the only files that import `modules` or gradio. `scripts/subquad.py` hands it each callback."""
