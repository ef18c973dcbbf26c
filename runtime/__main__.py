"""`python -m runtime` is the `runtime` command."""

if __name__ == "__main__":
    try:
        from runtime.cli import main

        main(prog_name="runtime")
    except KeyboardInterrupt:  # before the command could take it
        raise SystemExit(130) from None
