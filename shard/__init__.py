"""A shard: one rank of the group that holds the model. Tensors, no text, no policy."""
