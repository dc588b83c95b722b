"""The web UI's command-line flags that concern attention or settings."""

import argparse


def add_arguments(parser: argparse._ActionsContainer) -> None:
    """Add the host's flags, under the names that the web UI gives them."""
    parser.add_argument("--opt-sub-quad-attention", action="store_true", help="Automatic picks sub-quadratic")
    parser.add_argument("--opt-sdp-attention", action="store_true", help="Automatic picks scaled dot product")
    parser.add_argument("--disable-opt-split-attention", action="store_true", help="Automatic picks nothing")
    parser.add_argument(
        "--sub-quad-q-chunk-size", type=int, default=1024, metavar="N", help="query chunk size (default: 1024)"
    )
    parser.add_argument(
        "--sub-quad-kv-chunk-size",
        type=int,
        default=None,
        metavar="N",
        help="key/value chunk size (default: automatic)",
    )
    parser.add_argument(
        "--sub-quad-chunk-threshold",
        type=int,
        default=None,
        metavar="PERCENT",
        help="memory share above which the built-in splits (default: automatic)",
    )
    parser.add_argument("--no-half", action="store_true", help="float32 throughout, on a GPU too")
    parser.add_argument("--freeze-settings", action="store_true", help="no setting can be changed")
    parser.add_argument(
        "--freeze-settings-in-sections", metavar="LIST", help="nor any in these sections (default: none)"
    )
    parser.add_argument("--freeze-specific-settings", metavar="LIST", help="nor any of these (default: none)")


parser = argparse.ArgumentParser(add_help=False)
add_arguments(parser)
