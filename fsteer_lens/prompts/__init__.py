"""Prompts and contrasts, and how they become tokens."""

from fsteer_lens.prompts.contrasts import Contrast, ContrastSet, Split
from fsteer_lens.prompts.formats import PromptFormat
from fsteer_lens.prompts.forms import Message, Prompt

__all__ = ["Contrast", "ContrastSet", "Message", "Prompt", "PromptFormat", "Split"]
