"""Does an update raise the winners' loss, and do the method's assumptions hold at a checkpoint?

    python -m sdpo.lab audit --checkpoint output/run/checkpoint-500 --steps 32 TRAIN_FLAGS...

takes train.py's flags, which say on what data, by which method and at which step size the
checkpoint would be trained on. Nothing is trained. On each of --steps batches of --train_batch_size
pairs it finds what the next update would be, for every way of treating the losers, the first-order
change of the winners' errors along it, and their real change after it: on that batch, and on the
one after it. Then it compares, pair by pair, the gradients over the parameters with the residuals
that the safeguard puts in their place, and estimates the spectrum of the Jacobians. All in float32,
whatever --mixed_precision says.
Written to --output_dir: updates.jsonl, jacobian.jsonl, spectrum.jsonl, summary.json and PNGs;
killed at any point, the same command goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sdpo.common.files import claim_directory, write_json
from sdpo.common.flags import defaults_of
from sdpo.lab.audit.config import parse_config

SUMMARY_FILE = "summary.json"


def main(argv: Sequence[str]) -> int:
    """Measure what is not measured yet, sum up, draw, print; returns the exit code.

    Raises:
        UserError: naming the flag and what would be right.
    """
    config = parse_config(argv, __doc__)
    if config.run.check_only:
        return 0
    out = Path(config.run.output_dir)
    flags = {name: value for name, value in config.flags().items() if name != "output_dir"}
    claim_directory(out, flags, "--output_dir", "an audit", defaults_of(type(config)))

    from sdpo.lab.audit.figures import draw
    from sdpo.lab.audit.measure import measure
    from sdpo.lab.audit.summary import print_summary, summarise

    lines = measure(config, out)
    summary = summarise(lines, flags)
    write_json(out / SUMMARY_FILE, summary)
    draw(lines, summary, out)
    print_summary(summary)
    return 0
