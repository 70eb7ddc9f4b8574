"""Studies: each starts many processes, judges what came of them by the paper's statements, and writes one page."""
