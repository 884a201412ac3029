"""``python -m isobit`` is ``isobit``."""

import sys

from isobit.cli import main

sys.exit(main())
