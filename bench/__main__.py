"""`python -m bench` (`make bench`) is the load benchmark."""

from __future__ import annotations

import sys

from bench.serve import main

sys.exit(main())
