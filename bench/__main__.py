"""`python -m bench`: measures file systems side by side, and reports what came of it."""

from bench.cli import main

if __name__ == "__main__":
    main(prog_name="python -m bench")
