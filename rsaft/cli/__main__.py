"""`python -m rsaft.cli`, and `torchrun -m rsaft.cli`."""

from rsaft.cli import main

main()
