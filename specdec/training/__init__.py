"""Training drafters: texts, features of the frozen target, objectives, and the Trainer of transformers around them."""
