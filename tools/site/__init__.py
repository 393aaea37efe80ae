"""The documentation's site: what mkdocs needs to build it, and what is checked then."""
