"""The base of all errors that a user can mend."""


class UserError(Exception):
    """What was given cannot be used: the message says what it was, what is allowed and what to change."""
