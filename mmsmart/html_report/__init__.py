"""The HTML report of a run, or of several: what :mod:`mmsmart.engine.run_log` read, drawn.

Drawing needs matplotlib and the page Jinja2; both are imported when a report is written.
"""
