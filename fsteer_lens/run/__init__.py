"""Running a steered model: generating text, and asking it about text that is given."""
