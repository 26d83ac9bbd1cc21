"""One experiment per file. `get_config([preset])` returns it as an `ml_collections.ConfigDict`."""
