"""``mpdit plan``: memory, work and time of a run, before there are any GPUs."""
