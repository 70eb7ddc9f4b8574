"""How tests meet a file that may not be read, whoever runs them."""

from __future__ import annotations

import os

NOT_ABOVE_PERMISSIONS = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
"""What a command must be run by so that root, too, is refused what the permissions refuse."""
