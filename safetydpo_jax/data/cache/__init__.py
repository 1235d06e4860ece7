"""The pair cache: its records, its shards on disk, and the batches read from it."""
