"""Tasks of lm-evaluation-harness made of local files."""
