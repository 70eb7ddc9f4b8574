"""Train short, test long: study.py says what is trained and scored, findings.py judges it, report.py is the page."""
