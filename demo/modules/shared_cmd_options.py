"""The parsed flags. They hold their defaults until the demo's own command line has been read."""

from modules import cmd_args

cmd_opts = cmd_args.parser.parse_args([])
