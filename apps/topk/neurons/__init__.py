"""What a checkpoint's neurons fire on, measured and compared with controls.

text and measures     corpus.py, measures.py
files                 folder.py, reading.py
against the controls  comparison.py, and in words and tables comparison_text.py
"""
