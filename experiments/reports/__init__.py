"""Reports for people: HTML files that need nothing else, and the environment of a measurement."""
