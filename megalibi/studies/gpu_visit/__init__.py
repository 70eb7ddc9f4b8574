"""A visit to a GPU machine: steps.py lists the steps in order of worth, visit.py does it, report.py is its page."""
