"""A training run's folder beside its redrawing: what its samples were drawn with, and how close ours come.

`config_file.py` reads the run's config within limits, `settings.py` resolves it as the trainer does;
`run_folder.py` is the only door to the folder; `pairing.py` finds the adapter of each sample; `similarity.py`
measures; `serving.py` chooses model and profile; `drawing.py` asks a server, `calibration.py` which noise draw;
`session.py` runs it all; `facts.py`, `curve.py` and `report_page.py` write it down. Knows the client's
public calls and nothing of how they are made.
"""
