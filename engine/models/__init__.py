"""Target models: where their files are, how they are read, and the decoder that runs them."""
