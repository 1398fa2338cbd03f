"""Pretrain the small OPT of `sparq paper run --profile small-opt` on the King James Bible, whose copyright has expired.

python scripts/pretrain_opt.py OUT

The text is that of Debian's package bible-kjv (4.38), which has to be installed: its verses, normalized as transcripts
are, in the order of the book; every 20th block of 64 verses is held out. The model has OPT's layout with 4 blocks, 256
wide, and its own byte-level BPE of 2,048 pieces. Weights are written as bfloat16.
"""

import itertools
import math
import subprocess
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast, get_cosine_schedule_with_warmup

from sparq.audio.text import normalize_text

VERSES = "gen1:1-rev22:21"
CONTEXT, BATCH = 256, 16
UPDATES, WARMUP, RATE = 500, 60, 2e-3
BLOCK, HELD_OUT = 64, 20


def read_verses() -> list[str]:
    """Return the verses, normalized."""
    printed = subprocess.run(["bible", "-f", "-l", "100000", VERSES], capture_output=True, text=True, check=True).stdout
    lines = [line.partition(" ") for line in printed.splitlines() if ":" in line.partition(" ")[0]]
    return [normalize_text(text) for _, _, text in lines]


def train_tokenizer(verses: list[str]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE as OPT's, with its special pieces in their places."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=2048, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "<pad>", "</s>"], show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(verses, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="</s>", eos_token="</s>", pad_token="<pad>")


def to_rows(blocks: list[list[str]], tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """Return rows of CONTEXT pieces, verses apart by the end piece."""
    ids = [
        piece for block in blocks for verse in block for piece in [*tokenizer(verse).input_ids, tokenizer.eos_token_id]
    ]
    count = len(ids) // CONTEXT
    return torch.tensor(ids[: count * CONTEXT]).view(count, CONTEXT)


@torch.no_grad()
def perplexity(model: OPTForCausalLM, rows: Tensor) -> float:
    """Return the perplexity of the held-out text."""
    model.eval()
    losses = [float(model(input_ids=part, labels=part).loss) * len(part) for part in rows.split(BATCH)]
    model.train()
    return math.exp(sum(losses) / len(rows))


def main() -> None:
    out = Path(sys.argv[1])
    verses = read_verses()
    blocks = [verses[start : start + BLOCK] for start in range(0, len(verses), BLOCK)]
    held_out = blocks[::HELD_OUT]
    kept = [block for number, block in enumerate(blocks) if number % HELD_OUT]
    tokenizer = train_tokenizer(list(itertools.chain.from_iterable(kept)))
    train, test = to_rows(kept, tokenizer), to_rows(held_out, tokenizer)
    torch.manual_seed(0)
    model = OPTForCausalLM(
        OPTConfig(
            vocab_size=len(tokenizer), hidden_size=256, ffn_dim=1024, word_embed_proj_dim=256, num_hidden_layers=4,
            num_attention_heads=4, max_position_embeddings=1024, dropout=0.0, pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    print(f"{len(verses)} verses, {train.numel()} pieces to train on, {test.numel()} held out", flush=True)
    print(f"{sum(p.numel() for p in model.parameters())} parameters", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = get_cosine_schedule_with_warmup(optimizer, WARMUP, UPDATES)
    order: list[int] = []
    for update in range(1, UPDATES + 1):
        if len(order) < BATCH:
            order = torch.randperm(len(train)).tolist()
        rows, order = train[order[:BATCH]], order[BATCH:]
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if update % 50 == 0 or update == UPDATES:
            print(f"update {update}: loss {loss:.3f}, held-out perplexity {perplexity(model, test):.2f}", flush=True)
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main()
