"""``python -m refimpl``: the command line."""

import sys

from refimpl.cli import main

if __name__ == "__main__":
    sys.exit(main())
