"""ImageReward's loading and batching; that it equals the package is test_parity.py's matter."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from scripts.parity.small_scorers import SMALL_BLIP, BlipSize, write_imagereward
from sdpo.common.errors import UserError
from sdpo.evaluation.score.scorers.imagereward import TOKENS, Scorer
from sdpo.evaluation.score.weights import Weights

CPU = torch.device("cpu")
PROMPTS = ["a red circle", "", "a very long caption " * 20, "two cats on a chair"]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A directory with all of the files."""
    path = tmp_path_factory.mktemp("imagereward")
    write_imagereward(path)
    return path


@pytest.fixture(scope="module")
def scorer(written):
    """Loaded from `written`."""
    return load({"model": str(written), "tokenizer": str(written / "tokenizer")})


@pytest.fixture(scope="module")
def views():
    """Four images, uint8 (4, 3, 224, 224)."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 256, (4, 3, 7, 7), generator=generator, dtype=torch.uint8)
    return coarse.repeat_interleave(32, 2).repeat_interleave(32, 3)


@pytest.fixture
def own(written, tmp_path):
    """A copy of `written` that a test may break."""
    return shutil.copytree(written, tmp_path / "own")


def load(parts):
    return Scorer(Weights("imagereward", Scorer.parts, parts), CPU)


def load_own(path):
    return load({"model": str(path), "tokenizer": str(path / "tokenizer")})


def change(path, edit):
    """Edit a file of weights."""
    state = torch.load(path / "ImageReward.pt", weights_only=True)
    edit(state)
    torch.save(state, path / "ImageReward.pt")


@torch.no_grad()
def test_an_image_and_its_prompt_score_the_same_in_any_batch_and_order(scorer, views):
    together = scorer.score(views, PROMPTS)
    assert together.shape == (4,) and together.dtype == torch.float32
    assert together.unique().numel() == 4
    alone = torch.cat([scorer.score(v[None], [p]) for v, p in zip(views, PROMPTS, strict=True)])
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=0)
    reversed_ = scorer.score(views.flip(0), PROMPTS[::-1])
    torch.testing.assert_close(reversed_.flip(0), together, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_file_does_as_well_as_a_directory(written, scorer, views):
    parts = {"model": str(written / "ImageReward.pt"), "tokenizer": str(written / "tokenizer")}
    assert torch.equal(load(parts).score(views, PROMPTS), scorer.score(views, PROMPTS))


@torch.no_grad()
def test_what_the_reward_does_not_use_is_ignored(own, scorer, views):
    unused = {
        "blip.vision_proj.weight": torch.ones(256, 64),
        "blip.text_proj.bias": torch.ones(256),
        "blip.visual_encoder_m.cls_token": torch.ones(1, 1, 64),
        "blip.itm_head.weight": torch.ones(2, 64),
        "blip.queue_ptr": torch.zeros(1, dtype=torch.long),
        "blip.text_encoder.embeddings.position_ids": torch.arange(512)[None],
    }
    change(own, lambda state: state.update(unused))
    assert torch.equal(load_own(own).score(views, PROMPTS), scorer.score(views, PROMPTS))


def test_half_precision_weights_are_used_in_float32(own):
    change(own, lambda state: state.update({k: v.half() for k, v in state.items()}))
    scorer = load_own(own)
    for module in (scorer.vision, scorer.text, scorer.head):
        assert {p.dtype for p in module.parameters()} == {torch.float32}
        assert not module.training and not any(p.requires_grad for p in module.parameters())


def test_captions_are_padded_and_cut_to_35_tokens(scorer):
    tokens = scorer.tokens(PROMPTS)
    assert tokens.input_ids.shape == (4, TOKENS)
    assert tokens.attention_mask.sum(1).tolist() == [5, 2, 35, 8]
    assert tokens.input_ids[:, 0].tolist() == [101] * 4  # [CLS]
    added = scorer.tokenizer.convert_tokens_to_ids(["[DEC]", "[ENC]"])
    assert added == [30522, 30523]


def test_other_sizes_are_read_off_the_weights(tmp_path):
    write_imagereward(tmp_path, BlipSize(128, 1, 32, 3, 2, patch=28))
    scorer = load_own(tmp_path)
    vision = scorer.vision.config
    assert (vision.hidden_size, vision.num_hidden_layers, vision.patch_size) == (128, 1, 28)
    assert vision.num_attention_heads == 2 and vision.layer_norm_eps == 1e-6
    assert scorer.text.config.num_hidden_layers == 3


@pytest.mark.parametrize(
    "name",
    [
        "blip.visual_encoder.blocks.1.attn.qkv.bias",
        "blip.visual_encoder.pos_embed",
        "blip.text_encoder.encoder.layer.0.crossattention.self.key.weight",
        "mlp.layers.7.weight",
    ],
)
def test_a_missing_weight_is_named(own, name):
    change(own, lambda state: state.pop(name))
    with pytest.raises(UserError) as error:
        load_own(own)
    text = str(error.value)
    assert text.startswith(f"--weights imagereward={own / 'ImageReward.pt'}")
    assert "does not fit: Missing" in text or name in text
    assert "\n" not in text


def test_a_weight_of_another_shape_is_named(own):
    name = "blip.visual_encoder.blocks.0.mlp.fc2.weight"
    change(own, lambda state: state.update({name: torch.zeros(64, 255)}))
    with pytest.raises(UserError, match=r"size mismatch for encoder\.layers\.0\.mlp\.fc2\.weight"):
        load_own(own)


def test_an_unknown_weight_of_an_encoder_is_refused(own):
    name = "blip.visual_encoder.blocks.0.gamma"
    change(own, lambda state: state.update({name: torch.zeros(64)}))
    with pytest.raises(UserError, match=r"does not fit: Unexpected.*gamma"):
        load_own(own)


def test_another_image_size_is_refused(own):
    name = "blip.visual_encoder.pos_embed"
    change(own, lambda state: state.update({name: torch.zeros(1, 24**2 + 1, 64)}))
    with pytest.raises(UserError, match="takes images of 384 px, not 224"):
        load_own(own)


def test_files_that_are_not_imagereward(own):
    path = own / "ImageReward.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"imagereward: cannot read weights from .*ImageReward\.pt"):
        load_own(own)
    torch.save({"state_dict": {}}, path)
    with pytest.raises(UserError, match=r"ImageReward\.pt is not ImageReward's"):
        load_own(own)
    torch.save([1, 2], path)
    with pytest.raises(UserError, match=r"ImageReward\.pt is not ImageReward's"):
        load_own(own)
    path.unlink()
    with pytest.raises(UserError, match=r"--weights imagereward: there is no file .*ImageReward"):
        load_own(own)


def test_the_configuration_beside_the_weights(own):
    path = own / "med_config.json"
    path.write_text(json.dumps({**SMALL_BLIP.med_config(), "num_attention_heads": 7}))
    with pytest.raises(UserError, match=r"med_config\.json describes no text encoder"):
        load_own(own)
    path.write_text(json.dumps({**SMALL_BLIP.med_config(), "num_hidden_layers": 1}))
    with pytest.raises(UserError, match="does not fit: Unexpected"):
        load_own(own)
    config = SMALL_BLIP.med_config()
    del config["hidden_act"]
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"med_config\.json has no hidden_act"):
        load_own(own)
    path.write_text("{")
    with pytest.raises(UserError, match=r"imagereward\.config: cannot read .*med_config\.json"):
        load_own(own)
    path.unlink()
    with pytest.raises(UserError, match=r"no med_config\.json .*--weights imagereward\.config="):
        load_own(own)


def test_the_configuration_may_lie_elsewhere(own, tmp_path, scorer, views):
    elsewhere = shutil.move(own / "med_config.json", tmp_path / "config.json")
    parts = {"model": str(own), "config": str(elsewhere), "tokenizer": str(own / "tokenizer")}
    with torch.no_grad():
        assert torch.equal(load(parts).score(views, PROMPTS), scorer.score(views, PROMPTS))


def test_a_vocabulary_of_another_size_is_refused(own):
    (own / "tokenizer" / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")
    with pytest.raises(UserError, match=r"imagereward\.tokenizer: .* has 8 tokens .* 30524"):
        load_own(own)


def test_without_network_and_cache_the_message_names_the_file_and_the_flag(own, tmp_path):
    weights = Weights("imagereward", Scorer.parts, {}, str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"ImageReward\.pt .*--weights imagereward=PATH"):
        Scorer(weights, CPU)
    weights = Weights("imagereward", Scorer.parts, {"model": str(own)}, str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"bert-base-uncased.*--weights imagereward\.tokenizer=DIR"):
        Scorer(weights, CPU)
    (own / "tokenizer" / "vocab.txt").unlink()
    with pytest.raises(UserError, match=r"no vocabulary.*--weights imagereward\.tokenizer=DIR"):
        load_own(own)
