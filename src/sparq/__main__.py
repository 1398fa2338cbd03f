"""`python -m sparq`, the command `sparq`."""

import sys

from sparq.cli.main import main

sys.exit(main())
