"""What other libraries raise."""


def told(error: Exception) -> str:
    """An error of another library in one short line, for the part of a message that says what came."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200] or 'no reason given'}"
