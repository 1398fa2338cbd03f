"""Documents that lie one after another in one row, none of which sees another: padding-free batches.

Where they begin is told as transformers tells its flash attention, by `cu_seq_lens_q`: (0, n_1, n_1 + n_2, ...).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sparq.errors import SparqError

Attend = Callable[[Tensor, Tensor, Tensor, Bool[Tensor, "1 1 queries keys"] | None], Tensor]
"""Computes attention of queries, keys and values with a mask, causal without one."""
AttendShort = Callable[[Tensor, Tensor, Tensor, Sequence[int]], Tensor]
"""Computes attention of queries, keys and values of documents of the given lengths."""

SHORT = 256
"""Tokens of a document that counts as short."""


@dataclass(frozen=True, kw_only=True)
class Documents:
    """Where the documents of a row begin.

    Attributes:
        starts: offset of every document, and at last the number of tokens, in int32.
        longest: tokens of the longest document.
        window: how many keys a query sees at most, itself and those just before it; None is all (Mistral, Qwen).
    """

    starts: Int[Tensor, " documents_and_one"]
    longest: int
    window: int | None = None

    def mask(self) -> Bool[Tensor, "1 1 tokens tokens"]:
        """Return which key a query may see, for those who need it written out."""
        tokens = torch.arange(int(self.starts[-1]), device=self.starts.device)
        document = torch.searchsorted(self.starts, tokens, right=True)
        return (document[:, None] == document) & self._window_mask(len(tokens))

    def _window_mask(self, tokens: int) -> Bool[Tensor, "1 1 tokens tokens"]:
        allowed = torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device=self.starts.device).tril()
        return allowed if self.window is None else allowed.triu(1 - self.window)

    def attend_each(
        self,
        attend: Attend,
        attend_short: AttendShort | None,
        query: Float[Tensor, "1 heads tokens head_dim"],
        key: Float[Tensor, "1 kv_heads tokens head_dim"],
        value: Float[Tensor, "1 kv_heads tokens head_dim"],
    ) -> Float[Tensor, "1 tokens heads head_dim"]:
        """Compute one document after another, but short ones that follow each other together.

        Args:
            attend: computes one document.
            attend_short: computes some of at most `SHORT` tokens each; None leaves all to `attend`.
            query: queries of every head.
            key: keys; query head h reads key head h // (heads / kv_heads).
            value: values, likewise.
        """
        window = self.longest if self.window is None else self.window
        longest_short = 0 if attend_short is None else min(SHORT, window)
        runs: list[list[int]] = []
        for length in self.starts.diff().tolist():
            if length <= longest_short and runs and runs[-1][0] <= longest_short:
                runs[-1].append(length)
            else:
                runs.append([length])
        outputs = []
        queries, keys, values = (torch.split(x, [sum(run) for run in runs], dim=2) for x in (query, key, value))
        for run, q, k, v in zip(runs, queries, keys, values, strict=True):
            if run[0] <= longest_short:
                assert attend_short is not None
                outputs.append(attend_short(q, k, v, run))
            else:
                outputs.append(attend(q, k, v, None if run[0] <= window else self._window_mask(run[0])))
        return torch.cat(outputs, dim=1)


def documents_of(kwargs: Mapping[str, Any], query: Tensor, key: Tensor) -> Documents | None:
    """Return the documents that transformers' keyword arguments tell of, if they do.

    Raises:
        SparqError: there is more than one row, or a cache.
    """
    starts = kwargs.get("cu_seq_lens_q")
    if starts is None:
        return None
    if query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise SparqError(
            f"cu_seq_lens_q with queries of shape {tuple(query.shape)} and keys of shape {tuple(key.shape)}: documents"
            " are packed into one row, without a cache"
        )
    longest = kwargs.get("max_length_q")
    longest = int(starts.diff().max()) if longest is None else int(longest)
    return Documents(starts=starts, longest=longest, window=kwargs.get("sliding_window"))


def without_mask(_decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    """Keep transformers from making a mask of all tokens by all tokens for packed documents: a forward pre-hook.

    Raises:
        SparqError: positions are missing, so they would not begin anew.
    """
    starts = kwargs.get("cu_seq_lens_q")
    if starts is None:
        return None
    if kwargs.get("position_ids") is None:
        raise SparqError("cu_seq_lens_q without position_ids: pass both, positions beginning at 0 in every document")
    if kwargs.get("attention_mask") is not None:
        raise SparqError("cu_seq_lens_q with an attention_mask: documents are packed without padding, leave it out")
    # A mask of four dimensions is handed on as it is, and the attention does not read it.
    return args, {**kwargs, "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=starts.device)}
