"""`python -m asyncdapo` is `asyncdapo`."""

import sys

from asyncdapo.cli import main

sys.exit(main())
