"""Shards on a server: read by fsspec, kept in a cache on the local disk, fetched before they are needed."""
