"""Prompts and contrasts, and how they become tokens."""

from fsteer_lens.prompts.contrasts import Contrast, ContrastSet, Message, Prompt, Split

__all__ = ["Contrast", "ContrastSet", "Message", "Prompt", "Split"]
