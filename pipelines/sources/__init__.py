"""Where encoded images come from: folders, lists, tars, shards, .beton."""
