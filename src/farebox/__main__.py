"""``python -m farebox``: the same as the ``farebox`` command."""

from farebox.cli import main

main()
