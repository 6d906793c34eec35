"""`python -m mergelab` and the `mergelab` script: the guard first, then what takes time to import."""

__all__ = ["main"]


def main() -> None:
    """Runs the command line and exits; the statuses are those of `mergelab.cli.main.main`."""
    from mergelab.cli.guard import guarded

    guarded(_run)


def _run() -> int:
    from mergelab.cli.main import run

    return run()


if __name__ == "__main__":
    main()
