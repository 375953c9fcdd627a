"""`python -m sleepkern`: verify, bench, explain, info, demo."""

from .cli import main

if __name__ == "__main__":
    main()
