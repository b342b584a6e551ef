"""The root of every error that is the user's to mend."""


class UserError(ValueError):
    """A wrong input: the message names the value, the limit and the cure. The command line shows it and ends."""
