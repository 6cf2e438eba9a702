"""What a model card says of settings; whole runs' cards are in tests/e2e/test_card.py."""

from __future__ import annotations

import pytest

from sdpo.training.card import card_text, is_own
from sdpo.training.card_use import Weights
from sdpo.training.made import Made


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({}, "resized and cropped (centre) to 64 x 64 px, flipped at random; 20% of the captions"),
        ({"resize": "bucket"}, "to rectangles of about the area of 64 x 64 px, flipped"),
        ({"no_hflip": True, "proportion_empty_prompts": 0}, "64 x 64 px; 0% of the captions"),
        ({}, "| Safeguard | none |"),
        ({"loser_scale_fixed": 0.5}, "| Safeguard | the loser's gradient times 0.5 |"),
        ({"losers_one_in": 2}, "| Losers | of one pair in 2, drawn by chance |"),
        ({"lora_rank": 4, "use_dora": True}, "| Adapters | DoRA, rank 4, alpha 4 |"),
        ({"train_method": "sft"}, "Supervised fine-tuning on the winners alone"),
        ({}, "## Versions\n\nNot recorded."),
    ],
)
def test_settings_are_told(make_config, tmp_path, flags, said):
    made = Made(tmp_path / "run" / "checkpoint-1", make_config(**flags))
    text = card_text(made, [Weights("pipeline", "pipeline")])
    assert said in text
    assert is_own(text) and not is_own(text.replace("## Use", "## How"))


def test_the_average_is_called_that(make_config, tmp_path):
    config = make_config()
    for averaged in (False, True):
        made = Made(tmp_path / "run" / "checkpoint-1", config, averaged=averaged)
        text = card_text(made, [Weights("pipeline", "")])
        assert ("The weights are the moving average." in text) == averaged
