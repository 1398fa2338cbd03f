"""The small OPT that is shipped: whole, of the papers' layout, pretrained, and what its profile makes of it."""

import random
from importlib.resources import files
from pathlib import Path

import torch
from transformers import AutoTokenizer

from sparq.evaluation import prose_perplexity
from sparq.models.loading import load_backbone
from sparq.papers import Cell
from sparq.papers.profiles import SMALL_OPT, small_opt_profile

# Held out by scripts/pretrain_opt.py, as every 20th block of 64 verses.
GENESIS = """
in the beginning god created the heaven and the earth and the earth was without form and void and darkness was upon the
face of the deep and the spirit of god moved upon the face of the waters and god said let there be light and there was
light and god saw the light that it was good and god divided the light from the darkness and god called the light day
and the darkness he called night and the evening and the morning were the first day
"""


def test_it_has_learned_the_order_of_words() -> None:
    folder = str(files("sparq") / "papers" / SMALL_OPT)
    loaded = load_backbone(folder, attention="softmax1")
    assert (loaded.num_tensors, loaded.num_parameters) == (68, 3_946_496)
    assert (loaded.model.config.do_layer_norm_before, loaded.model.config.word_embed_proj_dim) == (True, 256)
    model, tokenizer = load_backbone(folder).model, AutoTokenizer.from_pretrained(folder)
    words = GENESIS.split()
    shuffled = random.Random(0).sample(words, len(words))
    pieces = [torch.tensor(tokenizer(" ".join(text)).input_ids) for text in (words, shuffled)]
    found, of_shuffled = (prose_perplexity(model, ids).value for ids in pieces)
    assert found < 90
    assert of_shuffled > 5 * found


def test_its_profile_is_the_demos_recipe_on_it(tmp_path: Path) -> None:
    profile = small_opt_profile(tmp_path, ["train.updates=7", "train.warmup_updates=2"])
    assert (profile.name, Path(profile.recipe.model.backbone).name) == (SMALL_OPT, SMALL_OPT)
    assert (profile.recipe.evaluate.vocoder or Path()).is_dir()
    full, ranked = (profile.recipe_of(Cell(framework="vanilla", adaptation=a, rank=r), 1).train for a, r in (
        ("full", 0), ("lora", 512),
    ))  # fmt: skip
    assert (full.method, full.updates, full.learning_rate, full.seed) == ("full", 7, 1e-3, 1)
    assert (ranked.rank, ranked.alpha, ranked.learning_rate) == (64, 128, 5e-3)
    units = next(step for step in profile.steps_of(Cell(framework="vanilla")) if step.name == "units")
    assert units.config(profile.recipe)["adapters"] == "shipped"
