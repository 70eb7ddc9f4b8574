"""The page of a comparison: page.py puts it together from findings.py, tables.py and plot.py."""
