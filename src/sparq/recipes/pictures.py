"""The outliers of a model as the records that a report draws."""

from dataclasses import dataclass, field

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from sparq.evaluation import OutlierReport, head_maps, most_sinky_head, token_norms
from sparq.report import AttentionMap, HiddenMap, LayerOutliers, Outliers, matrix


@dataclass
class Pictures:
    """Heat maps of models on one sequence each.

    All are of one head: the one that looks most at the first token in the first model.
    """

    attention: list[AttentionMap] = field(default_factory=list)
    hidden: list[HiddenMap] = field(default_factory=list)
    _head: tuple[int, int] | None = None

    def add(self, name: str, model: PreTrainedModel, ids: Tensor, labels: tuple[str, ...]) -> None:
        """Draw another model.

        Args:
            name: of its column.
            model: a causal LM.
            ids: the tokens of one sequence.
            labels: what they are.
        """
        self._head = self._head or most_sinky_head(model, ids)
        layer, head = self._head
        weights = head_maps(model, ids, layer, head).probabilities.numpy()
        self.attention.append(
            AttentionMap(framework=name, layer=layer, head=head, weights=matrix(weights), labels=labels)
        )
        norms = token_norms(model, ids).numpy().T
        self.hidden.append(HiddenMap(framework=name, norms=matrix(np.ascontiguousarray(norms)), labels=labels))


def outlier_figures(report: OutlierReport) -> Outliers:
    """Return what a report shows of a measurement."""
    return Outliers(
        max_inf_norm=report.max_inf_norm,
        mean_kurtosis=report.mean_kurtosis,
        attention_mass=report.attention_mass,
        first_token_share=report.first_token_share,
        tokens=report.num_tokens,
        final_norm_max_inf_norm=report.final_norm_max_inf_norm,
        per_layer=tuple(
            LayerOutliers(
                layer=index,
                max_inf_norm=layer.max_inf_norm,
                kurtosis=layer.kurtosis,
                attention_mass=layer.attention_mass,
                first_token_share=layer.first_token_share,
            )
            for index, layer in enumerate(report.layers)
        ),
    )
