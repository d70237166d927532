"""``mpdit rehearse``: everything about a launch that can be found out before a GPU hour is spent."""
