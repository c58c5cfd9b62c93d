"""What the neurons of a model stand for: recording them over a corpus, and measures of them."""
