"""Reading a model: activations of prompts and answers, and fingerprints of the model that gave them."""
