"""Image sources: bundled and downloaded datasets, folders, decoding, caching and streaming."""
