"""The method in tensors alone: subspaces and gates (when to steer), experts (how). Knows no model library."""
