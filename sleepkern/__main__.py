"""The command line: `python -m sleepkern`, or `sleepkern` where the package is installed.

verify   check every backend against the reference
bench    time calls, models and stacks of blocks
explain  say which backend a call takes, and why not the others
info     describe the machine and its backends
tune     search launch plans of the Triton kernels
train    train a small model on a task
study    compare trainings with several ways to sleep
curves   draw the accuracy of trainings
demo     run all of it in a few minutes
"""

import sys


def main() -> None:
    """Run the command line, or name the package that it lacks."""
    try:
        from .cli import main as run

        run()
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich", "matplotlib", "jinja2"):
            raise
        sys.exit(f"sleepkern: the command line needs {error.name}; pip install 'sleepkern[cli]' brings it")


if __name__ == "__main__":
    main()
