"""What surrounds a network in a bundle: weights, inferers, metrics, pictures, scores, and what a person is told."""
