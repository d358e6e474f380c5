"""`python -m yojo.cli`, as launchers of several processes want it."""

from yojo.cli import main

if __name__ == "__main__":  # which a process that only looks at its modules is not
    main()
