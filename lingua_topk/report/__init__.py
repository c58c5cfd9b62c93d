"""What an analysis looks like: figures, and the page that shows neurons.

Importing this room imports matplotlib; `import lingua_topk` does not.
"""
