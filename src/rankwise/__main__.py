"""`python -m rankwise`, the same as the command `rankwise`."""

from rankwise.cli.app import main

main()
