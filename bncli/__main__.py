"""`python -m bncli`, and so `torchrun -m bncli`."""

import sys

from bncli.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
