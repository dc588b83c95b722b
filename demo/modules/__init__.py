"""The part of the web UI's `modules` package that an attention extension meets, written anew and kept small.

Names, arguments and behaviour follow the web UI 1.10; whatever an extension of this kind does not touch is missing.
"""
