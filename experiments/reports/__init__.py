"""Reports for people: HTML files that need nothing else, and the environment of a measurement.

Nothing is offered here: commands import the modules.
"""
