"""Errors of videos."""


class VideoError(ValueError):
    """A video cannot be read, or not be written as asked."""
