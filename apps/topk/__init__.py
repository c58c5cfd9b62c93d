"""Train, evaluate and read TopK language models, in the manner of Lingua's apps."""
