"""Entry point of `python -m hub_magmax` and `accelerate launch -m hub_magmax`."""

from hub_magmax.cli import main

if __name__ == "__main__":
    main()
