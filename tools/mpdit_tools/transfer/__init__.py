"""``mpdit transfer``: a tuned proxy's values, carried to a larger model and written as a launch folder."""
