"""`python -m rsaft`."""

from rsaft.cli import main

main()
