"""From shards to tensors: index, plan, DALI, text."""
