"""The one exception that means "what you gave me is wrong"."""


class InputError(Exception):
    """Bad input, told in one sentence: the key or file, what is wrong with it, what would be right.

    The command line prints the sentence without a traceback and leaves with exit code 2. Raise it before any rank
    starts to train; nothing that a run has written may be lost by it.
    """


class CheckFailed(Exception):
    """The input was fine and the answer is "no": the command line prints the sentence and leaves with exit code 1."""
