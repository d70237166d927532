"""Around training: data building and the machine check."""
