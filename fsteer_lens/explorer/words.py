"""Words of the reader's own prompt that the model does not know."""

import re
from collections.abc import Mapping, Sequence


def parts(text: str, unknown: Mapping[str, Sequence[str]]) -> list[tuple[str, list[str] | None]]:
    """A text in parts: (part, None), or for an unknown word (word, the nearest known ones); joined they are the text.

    Args:
        text: as it was typed.
        unknown: {word: nearest known words}, in whichever case.
    """
    if not unknown:
        return [(text, None)] if text else []
    nearest = {word.lower(): list(known) for word, known in unknown.items()}
    longest_first = sorted(map(re.escape, nearest), key=len, reverse=True)
    pieces = re.split(rf"(?<!\w)({'|'.join(longest_first)})(?!\w)", text, flags=re.IGNORECASE)
    return [(piece, nearest.get(piece.lower()) if index % 2 else None) for index, piece in enumerate(pieces) if piece]
