"""What a person looks at after a run: curves, maps of embeddings, contact sheets, the report page."""
