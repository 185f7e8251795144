"""`python -m reftune_cli` is `reftune`."""

from reftune_cli import main

main()
