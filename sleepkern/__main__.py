"""`python -m sleepkern`, and `sleepkern` where the package is installed; `sleepkern --help` lists the commands."""

import sys


def main() -> None:
    """Run the command line, or say what it needs and does not find."""
    try:
        from .cli import main as run

        run()
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich", "matplotlib"):
            raise
        sys.exit(f"sleepkern: the command line needs {error.name}; pip install 'sleepkern[cli]' brings it")


if __name__ == "__main__":
    main()
