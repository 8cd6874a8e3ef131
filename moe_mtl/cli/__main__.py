"""`python -m moe_mtl.cli`."""

import sys

from . import main

sys.exit(main())
