"""Where images come from: bundled and downloaded sets, folders, decoding, and sets in memory."""
