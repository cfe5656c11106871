"""The error that every step from text to tokens raises."""

from __future__ import annotations

from terseformer.errors import UserError


class DataError(UserError, ValueError):
    """Data that a user can mend: the message says what was given, what is allowed and what to change."""
