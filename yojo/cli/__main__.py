"""`python -m yojo.cli`, as launchers of several processes want it."""

from yojo.cli import main

main()
