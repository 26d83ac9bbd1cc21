"""Pictures and pages about a run: curves, embedding maps, contact sheets, the report page."""
