"""Several runs from one config, made, judged and put side by side."""
