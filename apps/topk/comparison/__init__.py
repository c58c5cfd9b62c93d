"""Evaluations side by side, with their differences to a vanilla twin.

read       folders of evaluations      runs.py, validation_results.py, harness_results.py
compare    twins, paired differences   twins.py, differences.py, estimates.py
show       Markdown, CSV, terminal     markdown.py, spreadsheet.py, terminal.py
"""

from apps.topk.comparison.table import Comparison, compare

__all__ = ["Comparison", "compare"]
