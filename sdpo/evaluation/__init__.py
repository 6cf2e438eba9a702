"""Evaluation: generate.py, score.py and compare.py, programs joined by files on disk.

A suite of prompts (suites.py) becomes a folder of images and a manifest beside it (generate.py,
manifest.py); a manifest gets a file of scores, one row an image (score.py, scores.py, scorers/);
two or more score files become win rates and a report (compare.py).
"""
