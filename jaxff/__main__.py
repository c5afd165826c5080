"""`python -m jaxff` is the command line."""

from jaxff.cli import main

main()
