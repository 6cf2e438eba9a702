"""Train from kept encodings: VAE posteriors and text embeddings in sharded safetensors files.

`prepare` makes what is missing and opens the cache, `build` encodes, `store` reads, `manifest` is
the list of shards, `key` says what a cache depends on, `pairs` makes batches of it.
"""
