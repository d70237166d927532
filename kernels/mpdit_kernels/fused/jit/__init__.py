"""What the GPU runs. Compiled by Triton, so arguments are pointers, numbers and constants, and have no types here."""
