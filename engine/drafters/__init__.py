"""Drafters: each proposes a block of tokens that the target then verifies."""
