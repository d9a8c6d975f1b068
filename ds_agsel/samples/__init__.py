"""Which rows of the micro-batch each block learns from: the choice (pure), scores, gates in autograd, the record."""
