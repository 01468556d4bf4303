"""``python -m megamoe_ep.cli``: the same as ``megamoe-ep``, for launchers that take a module."""

from megamoe_ep.cli import main

main()
