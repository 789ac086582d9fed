"""What text may be, wherever it is kept."""


def storable(text: str) -> str:
    """The same text without what files, tables and terminals do not take: halves of surrogate pairs, and NULs.

    What is cut off may end in half a character; a mark stands where one was.
    """
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").replace("\0", "\ufffd")
