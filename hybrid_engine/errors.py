"""The one exception that means: the user can mend this."""


class UserError(RuntimeError):
    """A mistake in the user's input, with what is wrong, where, and what to do.

    The command line prints the message alone; a traceback would bury it.
    """
