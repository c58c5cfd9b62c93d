"""What a model is worth: likelihoods of text, perplexity, and the tasks of lm-eval."""
