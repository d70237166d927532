"""``mpdit checkpoint``: what a run has saved, whether it is whole, and the same in other files."""
