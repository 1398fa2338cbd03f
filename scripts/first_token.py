"""Put the first token's embedding of one SpeechLM into another, and see where their massive activations are.

python scripts/first_token.py RUN/manifest.tsv RUN/models/NAME ...

The sequences are those of transcription, of the first 24 utterances of the test splits: speech with its text. The
models share vocabulary and units. Prints a table; four models take six minutes of a busy core.
"""

import csv
import sys
from pathlib import Path

import torch

from sparq.adaptation import load_speechlm
from sparq.evaluation import find_massive_activations
from sparq.recipes.apply import encode_recordings
from sparq.recipes.outlier_sequences import alone, task_sequences

UTTERANCES = 24


def main(manifest: Path, folders: list[str]) -> None:
    with manifest.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file, delimiter="\t") if row["split"].startswith("test")][:UTTERANCES]
    speechlms = {folder: load_speechlm(Path(folder)) for folder in folders}
    first, *others = speechlms.values()
    assert all(other.vocabulary.pieces == first.vocabulary.pieces for other in others), "they have other vocabularies"
    units = encode_recordings(first, [manifest.parent / row["path"] for row in rows])
    spoken = zip((row["text"] for row in rows), units, strict=True)
    sequences = task_sequences(first.vocabulary, "asr", spoken)
    token = int(sequences[0][0])
    embeddings = {name: speechlm.model.get_input_embeddings().weight for name, speechlm in speechlms.items()}
    learned = {name: weight[token].detach().clone() for name, weight in embeddings.items()}
    print(
        f"| Model | Row of {first.vocabulary.pieces[token]} | With any | At the first token | Most often at | Largest |"
    )
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
    main(Path(sys.argv[1]), sys.argv[2:])
