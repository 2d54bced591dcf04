"""Shards in, microbatches out: cooking, encoding, packing and the elastic loader."""
