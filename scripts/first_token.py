"""Where a massive activation at the first token comes from: the attention, or the token's row of the embedding.

python scripts/first_token.py draw                                        # 10 minutes of a busy core
python scripts/first_token.py swap RUN/manifest.tsv RUN/models/NAME ...   # four models take 6

`draw` reads a sentence with SmolLM2-135M, untrained, under each attention, after each of 128 tokens of its vocabulary,
and after each of 128 rows drawn as those of a SpeechLM's new tokens are. `swap` puts the row of the first token of
transcription of one SpeechLM into another, and reads the first 24 utterances of the test splits, speech with its text;
the models share vocabulary and units.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer

from sparq.adaptation import load_speechlm
from sparq.audio import read_manifest
from sparq.evaluation import find_massive_activations
from sparq.models import load_model
from sparq.pretrained import resolve_model
from sparq.recipes.apply import encode_recordings
from sparq.recipes.outlier_sequences import alone, task_sequences

UTTERANCES, DRAWS = 24, 128
SENTENCE = "It was a bright cold day in the north, and the road was long."


def draw() -> None:
    folder = resolve_model("pretrained:smollm2-135m")
    sentence = AutoTokenizer.from_pretrained(folder)(SENTENCE, return_tensors="pt").input_ids[0]
    print(f"| Attention | First token, {DRAWS} of each | At the first token | Elsewhere alone | None |")
    print("|---|---|---|---|---|")
    for attention in ("vanilla", "softmax1", "max_shift"):
        model = load_model(folder, attention)
        weight = model.get_input_embeddings().weight
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randperm(len(weight), generator=generator)
        tokens = tokens[~torch.isin(tokens, sentence)][:DRAWS]
        rows = weight.mean(0) + weight.std(0) * torch.randn(DRAWS, weight.shape[1], generator=generator)
        sequences = [torch.cat([token[None], sentence]) for token in tokens]
        for kind in ("token", "new row"):
            if kind == "new row":
                with torch.no_grad():
                    weight[tokens] = rows
            found = find_massive_activations(model, alone(sequences))
            counts = (found.num_at_first, found.num_with - found.num_at_first, DRAWS - found.num_with)
            print(f"| `{attention}` | {kind} | {' | '.join(map(str, counts))} |", flush=True)


def swap(manifest: Path, folders: list[str]) -> None:
    tests = [each for each in read_manifest(manifest) if each.split.startswith("test")][:UTTERANCES]
    speechlms = {folder: load_speechlm(Path(folder)) for folder in folders}
    first, *others = speechlms.values()
    assert all(other.vocabulary.pieces == first.vocabulary.pieces for other in others), "they have other vocabularies"
    units = encode_recordings(first, [each.path for each in tests])
    spoken = zip((each.text for each in tests), units, strict=True)
    sequences = task_sequences(first.vocabulary, "asr", spoken)
    token = int(sequences[0][0])
    embeddings = {name: speechlm.model.get_input_embeddings().weight for name, speechlm in speechlms.items()}
    learned = {name: weight[token].detach().clone() for name, weight in embeddings.items()}
    piece = first.vocabulary.pieces[token]
    print(f"| Model | Row of {piece} | With any | At the first token | Most often at | Largest |")
    print("|---|---|---|---|---|---|")
    for name, speechlm in speechlms.items():
        for source, row in learned.items():
            with torch.no_grad():
                embeddings[name][token] = row
            found = find_massive_activations(speechlm.model, alone(sequences))
            most = ", ".join(f"{first.vocabulary.pieces[i]} {count}" for i, count in found.tokens.most_common(2))
            largest = max((abs(one.value) for one in found.found), default=0.0)
            of = "its own" if source == name else source
            print(f"| {name} | {of} | {found.num_with} | {found.num_at_first} | {most} | {largest:,.0f} |", flush=True)
        with torch.no_grad():
            embeddings[name][token] = learned[name]


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["draw"]:
            draw()
        case ["swap", manifest, *folders] if folders:
            swap(Path(manifest), folders)
        case _:
            sys.exit(__doc__)
