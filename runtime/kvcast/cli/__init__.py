"""The command ``kvcast``."""


def main() -> None:
    """Run it; the entry point of the installed command."""
    from .app import main as run

    run()
