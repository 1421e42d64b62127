"""`python -m pyfastpeft`: the command line of pyfastpeft.cli."""

import sys

from .cli import main

sys.exit(main())
