"""The one exception that means "what you gave me is wrong"."""


class InputError(Exception):
    """Bad input, told in one sentence: the key or file, what is wrong with it, what would be right.

    The command line prints the sentence without a traceback and leaves with exit code 2. Raise it before any rank
    starts to train; nothing that a run has written may be lost by it. Every rank of a job meets the same bad input and
    the first one says it; where a rank meets it alone, such as a damaged image, `any_rank` is set and that rank speaks.
    """

    any_rank = False


class CheckFailed(Exception):
    """The input was fine and the answer is "no": the command line prints the sentence and leaves with exit code 1."""
