"""Training: recipes, the one trainer, balancing, metrics, checkpoints. Importing this package imports nothing heavy."""
