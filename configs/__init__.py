"""One experiment per file; each has `get_config([preset])`, returning an `ml_collections.ConfigDict`."""
