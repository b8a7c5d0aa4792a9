"""``python -m kvcast.cli``."""

from . import main

main()
