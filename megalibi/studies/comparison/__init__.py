"""The paper's 1.3B comparison: study.py says what is compared; then come plan, speed, quality, results, report."""
