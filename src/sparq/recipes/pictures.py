"""The outliers of a model as the records that a report draws."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from sparq.evaluation import OutlierReport, head_maps, most_sinky_head, token_norms
from sparq.report import AttentionMap, HiddenMap, LayerOutliers, Outliers, TaskOutliers, matrix


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
        maps = head_maps(model, ids, layer, head)
        self.attention.append(
            AttentionMap(
                framework=name,
                layer=layer,
                head=head,
                weights=matrix(maps.probabilities.numpy()),
                values=matrix(maps.values.abs().numpy()),
                outputs=matrix(maps.output.abs().numpy()),
                labels=labels,
            )
        )
        norms = token_norms(model, ids).numpy().T
        self.hidden.append(HiddenMap(framework=name, norms=matrix(np.ascontiguousarray(norms)), labels=labels))


def outlier_figures(report: OutlierReport, by_task: Mapping[str, OutlierReport] | None = None) -> Outliers:
    """Return what a report shows of a measurement, and of each task apart."""
    return Outliers(
        max_inf_norm=report.max_inf_norm,
        mean_kurtosis=report.mean_kurtosis,
        attention_mass=report.attention_mass,
        first_token_share=report.first_token_share,
        sink_rate=report.sink_rate,
        attention_entropy=report.attention_entropy,
        max_logit=report.max_logit,
        first_value_norm=report.first_value_norm,
        sink_value_norm=report.sink_value_norm,
        other_value_norm=report.other_value_norm,
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
        by_task={
            name: TaskOutliers(max_inf_norm=own.max_inf_norm, mean_kurtosis=own.mean_kurtosis, tokens=own.num_tokens)
            for name, own in (by_task or {}).items()
        },
    )
