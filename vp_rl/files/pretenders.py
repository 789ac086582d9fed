"""What often lies where another file should be."""

_BEGINNINGS = (
    (b"version https://git-lfs", "a Git LFS pointer: run `git lfs pull`"),
    (b"<!doctype html", "an HTML page, often what a failed download leaves"),
    (b"<html", "an HTML page, often what a failed download leaves"),
)


def pretender(content: bytes) -> str | None:
    """What a file is that begins like this, and was to be an image or a table; None: nothing that is known here."""
    head = content[:1024].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return next((what for beginning, what in _BEGINNINGS if head.startswith(beginning)), None)
