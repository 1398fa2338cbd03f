"""The weights of the best validations, and their mean."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from sparq.files import atomic_path

Best = tuple[tuple[float, int], ...]
"""Accuracies and the updates they were reached at, the highest first."""


def insert(best: Best, accuracy: float, update: int, *, count: int) -> Best:
    """Return the best `count` with another one; of equal ones the earlier stays."""
    return tuple(sorted([*best, (accuracy, update)], key=lambda pair: (-pair[0], pair[1]))[:count])


class BestWeights:
    """A folder of safetensors, one file for each update that is kept."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, update: int, weights: dict[str, Tensor]) -> None:
        """Keep the weights of an update."""
        with atomic_path(self._file(update)) as temporary:
            save_file({name: weight.contiguous() for name, weight in weights.items()}, temporary)

    def prune(self, *keep: Best) -> None:
        """Remove all but these."""
        kept = {self._file(update) for best in keep for _, update in best}
        for file in set(self.folder.glob("*.safetensors")) - kept:
            file.unlink()

    def mean(self, best: Best) -> Iterator[tuple[str, Tensor]]:
        """Yield the mean of every weight, by name."""
        files = [load_file(self._file(update)) for _, update in best]
        for name in list(files[0]):
            yield name, _mean(file.pop(name) for file in files)

    def _file(self, update: int) -> Path:
        return self.folder / f"{update:08d}.safetensors"


def _mean(tensors: Iterable[Tensor]) -> Tensor:
    first, *others = tensors
    for tensor in others:
        first += tensor
    return first / (1 + len(others))
