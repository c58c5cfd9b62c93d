"""What a checkpoint's neurons fire on, measured and compared with controls.

record and measure      corpus.py, reading.py, measures.py; analysis.py does all of it
files                   folder.py
twin and controls       comparison.py, in words and tables comparison_text.py
"""
