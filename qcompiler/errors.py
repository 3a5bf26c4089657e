"""The errors that a user may meet. Each message says what, where and what to do."""

from __future__ import annotations


class QCompilerError(Exception):
    """Anything that the compiler refuses, with a message meant for the user."""


class InputError(QCompilerError):
    """The user's input (a file, an option, calibration data) cannot be used as it is."""


class CaptureError(QCompilerError):
    """`torch.export` could not capture the model."""


class RewriteError(QCompilerError):
    """A pass failed, left an invalid program, or moved the numbers although it claims not to."""


class UnsupportedError(QCompilerError):
    """The target or backend cannot run what was asked for."""


class VerifyError(QCompilerError):
    """An artifact broke a bound of its recipe, or its files are not those that were written."""


def nearest(word: str, known: list[str]) -> str:
    """A hint that names the known word closest to `word`, or all of them."""
    from difflib import get_close_matches

    close = get_close_matches(word, known, n=1, cutoff=0.5)
    listed = ", ".join(sorted(known))
    return f"did you mean '{close[0]}'? Known: {listed}" if close else f"known: {listed}"


def first_line(error: BaseException) -> str:
    """The first line of an error's text, cut to 300 characters; its class where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
