"""The extrapolation study: results, pictures and report."""
