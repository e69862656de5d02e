"""A drafter for any supported target: answers, features, training, checkpoint, evaluation."""
