#!/usr/bin/env python3
"""Split a model into stage folders; the same as `flowspec split MODEL --stages N`."""

import sys

from flowspec.cli.main import main

if __name__ == "__main__":
    sys.argv[1:1] = ["split"]
    main()
