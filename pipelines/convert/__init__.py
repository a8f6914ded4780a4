"""Converting images into shards or a .beton."""
