"""`python -m consilium` is `consilium`."""

import sys

from consilium.cli import main

sys.exit(main())
