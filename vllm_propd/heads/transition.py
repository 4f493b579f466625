"""A transition term: heads that know the token before the one that they predict.

Medusa's heads predict their places independently, and the paper says what that costs: a
tree's paths are products of marginals. Here head k's logits for token v after token u are
``U_k(v) + before[u] . after[v]``: its own, and a product of two thin tables, the same for
all heads. Head 1's token before is the root, which is known when heads are asked.

Every pair of candidates is scored, a small matrix; what lies beyond them counts as without
the term. Tokens that the term alone makes likely are candidates, too: each frequent
token's best successors, a table made once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn
from torch.nn import functional

if TYPE_CHECKING:
    from vllm_propd.core.tree import Float32s, Ints
    from vllm_propd.kernels.int8_heads_cpu import Int8Linear

SUCCESSORS = 2
"""How many successors of each of a head's best candidates are the next one's candidates."""

PARENTS = 4
"""How many of a head's best candidates have successors."""


class CoupledTensors(NamedTuple):
    """``core.drafting.candidates.Candidates`` as tensors; tokens are their places."""

    tokens: torch.Tensor
    log_probs: torch.Tensor
    next_row: torch.Tensor


class Transition(nn.Module):
    """The two tables.

    Args:
        tokens: how many tokens heads may draft; place ``tokens`` stands for any other.
        rank: columns of the tables.
    """

    def __init__(self, tokens: int, rank: int):
        super().__init__()
        # A product of zeros would never learn.
        self.before = nn.Parameter(torch.randn(tokens, rank) / rank**0.5)
        self.after = nn.Parameter(torch.zeros(tokens, rank))
        self._successors: torch.Tensor | None = None
        self._packed: tuple[Float32s, Int8Linear] | None = None
        self._tables: tuple[Ints, Float32s, Float32s] | None = None

    def forward(
        self, parents: torch.Tensor, columns: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Returns what the term adds to logits, ``[..., columns or tokens]``.

        Args:
            parents: ``[...]`` int64 places of the tokens before.
            columns: ``[columns]`` int64 places of the tokens after; None: all.
        """
        after = self.after if columns is None else self.after[columns]
        return self._before(parents) @ after.T

    def _before(self, parents: torch.Tensor) -> torch.Tensor:
        known = parents < len(self.before)
        rows = self.before[parents.clamp(max=len(self.before) - 1)]
        return rows * known[..., None]

    @torch.no_grad()
    def successors(self) -> torch.Tensor:
        """Returns ``[tokens, SUCCESSORS]`` int64, each token's best by the term alone."""
        if self._successors is None:
            count = min(SUCCESSORS, len(self.after))
            parts = self.before.split(1024)
            rows = [(part @ self.after.T).topk(count).indices for part in parts]
            self._successors = torch.cat(rows)
        return self._successors

    @torch.no_grad()
    def pack(self) -> None:
        """Lets roots read ``after`` in 8 bits (CPUs only)."""
        from vllm_propd.kernels.int8_heads_cpu import Int8Linear  # numba, as below

        # Tokens that heads do not draft have the row of zeros.
        before = functional.pad(self.before, (0, 0, 0, 1)).numpy()
        self._packed = before, Int8Linear(self.after[None])
        self._tables = self._as_arrays()

    def _as_arrays(self) -> tuple[Ints, Float32s, Float32s]:
        tables = self.successors(), self.before.detach(), self.after.detach()
        successors, before, after = (table.numpy() for table in tables)
        return successors, before, after

    def _of_roots(self, roots: torch.Tensor) -> Float32s:
        """Returns ``[sequences, tokens]``, what the term adds after the roots."""
        if self._packed is None:
            return self(roots).float().numpy()  # of 16 bits where autocast is on
        before, after = self._packed
        return after.products(before[roots.numpy()][None])[0]

    @torch.no_grad()
    def couple(
        self, logits: torch.Tensor, roots: torch.Tensor, ranks: int
    ) -> CoupledTensors:
        """Returns the candidates of each head after each candidate of the one before.

        Args:
            logits: ``[heads, sequences, tokens]`` float32, the heads' own.
            roots: ``[sequences]`` int64 places of the roots.
            ranks: the most candidates after one token.

        Returns:
            ``[sequences, heads, rows, ranks]`` tensors.
        """
        ranks = min(ranks, logits.shape[-1])
        if logits.device.type == "cpu":
            from vllm_propd.kernels.couple_cpu import couple  # numba, where heads are asked

            found = couple(
                logits.contiguous().numpy(), self._of_roots(roots), ranks,
                *(self._tables or self._as_arrays()), PARENTS,
            )  # fmt: skip
            return CoupledTensors(*map(torch.from_numpy, found))
        # The first head's are known exactly: there is one token before them.
        logits = torch.cat([(logits[0] + self(roots))[None], logits[1:]])
        best, places = logits.topk(ranks)
        total = logits.logsumexp(-1, keepdim=True)
        return self._coupled(logits, best, places, total, ranks)

    def _coupled(
        self,
        logits: torch.Tensor,
        best: torch.Tensor,
        places: torch.Tensor,
        total: torch.Tensor,
        ranks: int,
    ) -> CoupledTensors:
        """Does what ``couple`` does on any device, in torch's own steps."""
        parents = places[:-1, :, :PARENTS]
        extra = self.successors()[parents].flatten(2)
        # The first head needs none: it has the best of all tokens already.
        none = places[:1, :, :1].expand(-1, -1, extra.shape[2])
        extra = torch.cat([none, extra])
        known = torch.cat([places, extra], -1)
        said = torch.cat([best, logits.gather(-1, extra)], -1)
        said = said.masked_fill(_seen_before(known), -torch.inf)
        # Row 0 of each head: after a token that has no row of its own.
        rows = [(said - total)[:, :, None]]
        with_term = said[1:, :, None] + self._pairs(known)
        others = total + torch.log1p(
            -(said - total).exp().sum(-1, True).clamp(max=1 - 1e-6)
        )
        norm = torch.logaddexp(with_term.logsumexp(-1, True), others[1:, :, None])
        following = with_term - norm
        rows.append(torch.cat([rows[0][:1].expand(-1, -1, known.shape[2], -1), following]))
        values, order = torch.cat(rows, 2).topk(ranks)
        found = known[:, :, None].expand(-1, -1, values.shape[2], -1).gather(-1, order)
        return CoupledTensors(
            *(one.transpose(0, 1).contiguous() for one in (found, values, order + 1))
        )

    def _pairs(self, known: torch.Tensor) -> torch.Tensor:
        """Returns the term of each head's candidates after each of the one before."""
        return self._before(known[:-1]) @ self.after[known[1:]].mT


def _seen_before(tokens: torch.Tensor) -> torch.Tensor:
    """Marks those of ``[..., n]`` tokens that stand further left, too."""
    same = tokens[..., None, :] == tokens[..., :, None]
    return torch.tril(same, diagonal=-1).any(-1)
