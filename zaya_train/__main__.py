"""`python -m zaya_train` is the `zaya` command."""

import sys

from zaya_train.main import main

if __name__ == "__main__":
    sys.exit(main())
