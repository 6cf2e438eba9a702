"""HPS v2.1: HPSv2 with its authors' later weights. Its scores do not compare with those of v2."""

from __future__ import annotations

from sdpo.evaluation.score.scorers import hpsv2
from sdpo.evaluation.score.weights import Part


class Scorer(hpsv2.Scorer):
    """Larger is better."""

    label = "HPSv2.1"
    parts = {  # noqa: RUF012
        "model": Part(hub="xswu/HPSv2", file="HPS_v2.1_compressed.pt"),
    }
