"""A small host for the extension, for a machine without a web UI: `python -m demo --help`.

It loads scripts/subquad.py as the web UI does, through a `modules` package of its own, and makes images with the real
latent-diffusion U-Net and VAE.
"""
