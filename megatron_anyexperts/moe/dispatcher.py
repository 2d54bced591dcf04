"""All-to-all dispatch of a variable number of slots per token.

A *slot* is one (token, real expert) pair. Shapes: `T` local tokens, `H` hidden, `E` real experts, `L = E / P` local
experts, `P` expert-parallel ranks, `X` expert-tensor-parallel ranks, `S = P * X` sources, `N` slots after the
exchange.

1. Counts: every source gathers every source's slots per expert (the one exchange the stock dispatcher makes too).
   With `anyexperts_balance=copies` they make a plan of expert copies; where that has any, the columns of the routing
   map become physical experts, `L + R` on a rank, and `E` below is their number.
2. Cap (only with `anyexperts_dispatch_eps`, and where a rank is over it): reroute, fall back to virtual (`cap.py`).
3. Permute: `[T, H]` -> slots sorted by expert.
4. All-to-all over the expert-parallel group, then over the expert-tensor group where X > 1.
5. Sort the received chunks by local expert -> `[N, H]`.

`combine` undoes 5 to 3 and sums each token's slots. Gates travel with the slots, and the experts apply them.
"""

import math
from dataclasses import dataclass, replace

import torch
from megatron.core.tensor_parallel import all_to_all
from megatron.core.transformer.moe.moe_utils import (
    get_align_size_for_quantization,
    pad_routing_map,
    permute,
    sort_chunks_by_idxs,
    unpermute,
)
from torch import Tensor

from megatron_anyexperts.moe import fused_permute
from megatron_anyexperts.moe.cap import Sources, UnderCap, fit
from megatron_anyexperts.moe.copies import CopyPlan, plan_copies
from megatron_anyexperts.moe.copy_price import settle
from megatron_anyexperts.moe.decision import RoutingDecision
from megatron_anyexperts.moe.host_copy import HostCopy
from megatron_anyexperts.moe.kept_copies import KeptCopies
from megatron_anyexperts.moe.kernels import has_kernels
from megatron_anyexperts.moe.physical_experts import PhysicalExperts, lay_out, on_physical_experts
from megatron_anyexperts.moe.quotas import slot_cap


@dataclass(frozen=True)
class LoadReport:
    """Slots per expert rank in one step of one expert-parallel group; the same on all its ranks, padding excluded.

    Attributes:
        demanded_P: int64, slots the routers asked for.
        received_P: int64, slots sent; differs from `demanded_P` only where the cap acted.
        received_E: int64, the same per expert.
        rerouted: int64 scalar, slots sent to another expert than the router chose.
        displaced: int64 scalar, slots made virtual by the cap.
        cap: slots a rank may receive; None when the cap is off.
        copied: int64 scalar, slots computed by copies.
    """

    demanded_P: Tensor
    received_P: Tensor
    received_E: Tensor
    rerouted: Tensor
    displaced: Tensor
    cap: int | None
    copied: Tensor


@dataclass(frozen=True)
class _Columns:
    """How the columns of a routing map lie on expert ranks, the same number on each.

    Attributes:
        width: columns of a rank.
        local: those of this rank.
        by_expert: order of arrived chunks that puts those of one expert in a row.
        by_source: the way back.
    """

    width: int
    local: slice
    by_expert: Tensor
    by_source: Tensor


@dataclass(frozen=True)
class _Assigned:
    """Which column of the routing map computes each slot of this source, and what is to be told of it.

    Attributes:
        gates_TE, routing_map_TE: of the columns.
        counts_SE: int64, slots of every source for every column; `known_SE` on the host where it is there already.
        columns: how they lie on ranks.
        demanded_P, rerouted, displaced, cap: as in `LoadReport`.
        copy_plan, physical: of copies; None without any.
        displaced_gate_T: as in `Dispatched`.
    """

    gates_TE: Tensor
    routing_map_TE: Tensor
    counts_SE: Tensor
    known_SE: Tensor | None
    columns: _Columns
    demanded_P: Tensor
    rerouted: Tensor
    displaced: Tensor
    copy_plan: CopyPlan | None
    physical: PhysicalExperts | None
    cap: int | None = None
    displaced_gate_T: Tensor | None = None


@dataclass(frozen=True)
class _Route:
    """The way back: all that `combine` needs."""

    shape: torch.Size
    columns: _Columns
    routing_map_TE: Tensor
    permutation: Tensor
    input_splits: list[int]
    output_splits: list[int]
    tp_splits: list[int]
    chunk_sizes: Tensor
    gate_dtype: torch.dtype


@dataclass(frozen=True)
class Dispatched:
    """What arrived for the local experts.

    Attributes:
        expert_input: [N, H], slots sorted by local expert.
        tokens_per_expert: int64 [L] on the CPU, where each expert's slots end; with alignment padding, if on. With
            copies [L + R], those of the copies last.
        expert_probs: [N], the gates of the slots.
        displaced_gate_T: summed gates of the slots the cap made virtual, differentiable; None: it made none.
        load: slots per rank, for metrics.
        plan: of the copies; None without any.
        route: the way back, for `SlotDispatcher.combine`.
    """

    expert_input: Tensor
    tokens_per_expert: Tensor
    expert_probs: Tensor
    displaced_gate_T: Tensor | None
    load: LoadReport
    plan: CopyPlan | None
    route: _Route


class SlotDispatcher:
    """Carries slots to their experts and back.

    Owns no parameters, and keeps no state between calls but where copies are: `dispatch` returns all that `combine`
    needs.

    Args:
        config: an `AnyExpertsConfig`. Read: `num_moe_experts`, `moe_permute_fusion`,
            `moe_router_padding_for_quantization`, `anyexperts_dispatch_eps`, `anyexperts_k_max`, and
            `anyexperts_balance` with the options of copies.
        num_local_experts: experts on this rank.
        local_expert_indices: their global indices, consecutive.
        pg_collection: process groups `ep`, `expt_tp` and `tp_ep`.

    Raises:
        ValueError: the local experts are not a consecutive, equal share.
    """

    def __init__(self, config, num_local_experts: int, local_expert_indices: list[int], pg_collection) -> None:
        self.config = config
        self.ep_group, self.tp_group, self.tp_ep_group = (
            pg_collection.ep,
            pg_collection.expt_tp,
            pg_collection.tp_ep,
        )
        self.ep_size, self.tp_size = self.ep_group.size(), self.tp_group.size()
        self.tp_rank, self.source = self.tp_group.rank(), self.tp_ep_group.rank()
        first = self.ep_group.rank() * num_local_experts
        if num_local_experts * self.ep_size != config.num_moe_experts or list(local_expert_indices) != list(
            range(first, first + num_local_experts)
        ):
            raise ValueError(
                f"local experts {list(local_expert_indices)} of rank {self.ep_group.rank()} are not the consecutive "
                f"share of num_moe_experts={config.num_moe_experts} over expert_model_parallel_size={self.ep_size}; "
                "use an expert parallel size that divides the number of experts"
            )
        self.num_local_experts, self.local = num_local_experts, slice(first, first + num_local_experts)
        eps = config.anyexperts_dispatch_eps
        self.eps = None if eps is None or math.isinf(eps) or self.ep_size == 1 else eps
        self.cap_ranks = self.ep_size
        self.align = get_align_size_for_quantization(config) if config.moe_router_padding_for_quantization else 0
        self.balance = settle(config, self.ep_group)
        self.places = config.anyexperts_copies_per_rank if self.balance.copies else 0
        self.kept = None
        if self.balance.copies and config.anyexperts_copies_refresh:
            how = self.places, config.anyexperts_copies_eps, self.balance.least
            self.kept = KeptCopies(config.anyexperts_copies_refresh, self.ep_size, *how)
        self._owned, self._physical = (self._columns(num_local_experts + more) for more in (0, self.places))

    def _columns(self, width: int) -> _Columns:
        first = self.ep_group.rank() * width
        chunks = torch.arange(
            self.ep_size * width * self.tp_size, device="cuda" if self.config.moe_permute_fusion else "cpu"
        )
        return _Columns(
            width,
            slice(first, first + width),
            chunks.reshape(-1, width).T.ravel(),
            chunks.reshape(width, -1).T.ravel(),
        )

    def _sorts(self, columns: _Columns) -> bool:
        """Whether what arrives must be sorted by expert: from one source it is."""
        return columns.width > 1 and self.ep_size * self.tp_size > 1

    def dispatch(self, hidden_TH: Tensor, decision: RoutingDecision) -> Dispatched:
        """Send each real slot of `decision` to its expert's rank.

        Args:
            hidden_TH: [T, H]; T may be 0 and may differ between ranks.
            decision: gates and slots of the local tokens.

        Raises:
            ValueError: alignment padding is on and T is not a multiple of the alignment.
        """
        assigned = self._assign(decision)
        gates_TE, map_TE, columns = assigned.gates_TE, assigned.routing_map_TE, assigned.columns
        counts_SE, known = assigned.counts_SE, assigned.known_SE
        if self.align:
            gates_TE, map_TE = self._pad(gates_TE, map_TE)
            counts_SE, known = self._aligned(counts_SE), None if known is None else self._aligned(known)
        told_SE = counts_SE if known is None else known
        copy = HostCopy(torch.cat((told_SE[self.source], self._chunks(told_SE, columns).ravel())))
        load = self._report(assigned)

        sent_E, chunks = copy.wait().split((counts_SE.shape[1], self.tp_size * counts_SE.shape[1]))
        input_splits = sent_E.view(self.ep_size, -1).sum(1).tolist()
        chunks_XPL = chunks.view(self.tp_size, self.ep_size, -1)
        output_splits = chunks_XPL[self.tp_rank].sum(1).tolist()
        tp_splits = chunks_XPL.sum((1, 2)).tolist()
        fused = self.config.moe_permute_fusion
        counts_E = counts_SE[self.source]
        slots, probs, permutation = self._permute(hidden_TH, map_TE, gates_TE, counts_E, sum(input_splits))
        chunk_sizes = self._chunks(counts_SE, columns).ravel() if fused else chunks_XPL.ravel()
        splits = input_splits, output_splits, tp_splits
        route = _Route(hidden_TH.shape, columns, map_TE, permutation, *splits, chunk_sizes, gates_TE.dtype)
        slots, probs = (
            self._gather_tp(all_to_all(self.ep_group, x, output_splits, input_splits), tp_splits)
            for x in (slots, probs)
        )
        if self._sorts(columns):
            slots, probs = sort_chunks_by_idxs(slots, chunk_sizes, columns.by_expert, probs=probs, fused=fused)
        tokens_per_expert = chunks_XPL.sum((0, 1))
        return Dispatched(slots, tokens_per_expert, probs, assigned.displaced_gate_T, load, assigned.copy_plan, route)

    def _assign(self, decision: RoutingDecision) -> _Assigned:
        """Decide which expert, and which copy of it, computes each slot: steps 1 and 2 of the module docstring."""
        counts_SE = self._gather(decision.routing_map_TE.sum(0))
        demanded_P = self._per_rank(counts_SE, self._owned).sum(0)
        columns, known, plan, physical = self._owned, None, None, None
        if self.balance.copies:
            # The one wait for a GPU: the splits follow from these counts as well, unless a cap changes them.
            known = counts_SE.cpu()
            plan, physical = self._plan_copies(known)
        if plan is not None:
            columns, known, physical = self._physical, physical.slots_SQ, physical.to(counts_SE.device)
            counts_SE, decision = physical.slots_SQ, on_physical_experts(decision, physical, self.source)
        zero = demanded_P.new_zeros(())
        assigned = _Assigned(
            decision.gates_TE,
            decision.routing_map_TE,
            counts_SE,
            known,
            columns,
            demanded_P,
            zero,
            zero,
            plan,
            physical,
        )
        if self.eps is None:
            return assigned
        # One wait tells whether the cap acts at all. If not, the splits follow from these counts too.
        known = counts_SE.cpu() if known is None else known
        cap = slot_cap(known.sum(), self.cap_ranks, self.eps).item()
        assigned = replace(assigned, known_SE=known, cap=cap)
        if known.view(-1, self.cap_ranks, known.shape[1] // self.cap_ranks).sum((0, 2)).max() <= cap:
            return assigned
        under = self._fit(decision, cap, int(known.sum()))
        fitted = under.fitted[0]
        return replace(
            assigned,
            gates_TE=fitted.gates_TE,
            routing_map_TE=fitted.routing_map_TE,
            counts_SE=under.counts_SE,
            known_SE=under.known_SE,
            rerouted=self._add(fitted.rerouted),
            displaced=zero if under.settled else demanded_P.sum() - under.counts_SE.sum(),
            displaced_gate_T=fitted.displaced_gate_T,
        )

    def _report(self, assigned: _Assigned) -> LoadReport:
        received_E, physical = assigned.counts_SE.sum(0), assigned.physical
        received_P, copied = received_E.view(self.ep_size, -1).sum(1), assigned.demanded_P.new_zeros(())
        if physical is not None:
            copied = physical.slots_of_copies(received_E)
            received_E = physical.per_logical(received_E, self.config.num_moe_experts)
        moved = assigned.rerouted, assigned.displaced, assigned.cap
        return LoadReport(assigned.demanded_P, received_P, received_E, *moved, copied)

    def _plan_copies(self, counts_SE: Tensor) -> tuple[CopyPlan | None, PhysicalExperts | None]:
        """The plan and its columns, on the host; None where no copy helps."""
        if self.kept is not None:
            plan = self.kept.plan(counts_SE.numpy())
        else:
            eps = self.config.anyexperts_copies_eps
            plan = plan_copies(counts_SE.numpy(), self.ep_size, self.places, eps, self.balance.least)
        if not plan.copies:
            return None, None
        return plan, lay_out(counts_SE.numpy(), self.ep_size, self.places, plan)

    def _fit(self, decision: RoutingDecision, cap: int, slots: int) -> UnderCap:
        sources = Sources(lambda counts: self._gather(*counts), self._add, range(self.source, self.source + 1))
        fused = has_kernels(self.config.anyexperts_kernels, decision.gates_TE)
        return fit([decision], cap, slots, self.cap_ranks, self.config.anyexperts_k_max, sources, fused)

    def combine(
        self, expert_output_NH: Tensor, dispatched: Dispatched, added: tuple[Tensor | None, ...] = (None, None, None)
    ) -> Tensor:
        """Bring expert outputs back and sum the slots of each token.

        Args:
            expert_output_NH: [N, H], outputs for `dispatched.expert_input`, already multiplied by the gates.
            dispatched: what `dispatch` returned.
            added: only where `has_kernels`: see `fused_permute.unpermute`.

        Returns:
            [T, H] in the dtype of the expert output; zero for a token without slots.
        """
        route, x = dispatched.route, expert_output_NH
        fused = self.config.moe_permute_fusion
        if self._sorts(route.columns):
            by_source = route.chunk_sizes.view(-1, route.columns.width).T.ravel()
            x, _ = sort_chunks_by_idxs(x, by_source, route.columns.by_source, fused=fused)
        x = self._reduce_tp(x, route)
        x = all_to_all(self.ep_group, x, route.input_splits, route.output_splits)
        if self.has_kernels(x):
            return fused_permute.unpermute(x, route.permutation, *added)
        return unpermute(x, route.permutation, restore_shape=route.shape, routing_map=route.routing_map_TE, fused=fused)

    def _gather(self, counts: Tensor) -> Tensor:
        """int64 [n] of this source -> [S, n] of all sources."""
        if self.tp_ep_group.size() == 1:
            return counts[None]
        gathered = counts.new_empty(self.tp_ep_group.size() * counts.numel())
        torch.distributed.all_gather_into_tensor(gathered, counts, group=self.tp_ep_group)
        return gathered.view(self.tp_ep_group.size(), -1)

    def _add(self, counts: Tensor) -> Tensor:
        """Add up integers over all sources, in place."""
        if self.tp_ep_group.size() > 1:
            torch.distributed.all_reduce(counts, group=self.tp_ep_group)
        return counts

    def _per_rank(self, counts_SE: Tensor, columns: _Columns) -> Tensor:
        return counts_SE.view(-1, self.ep_size, columns.width).sum(2)

    def _chunks(self, counts_SE: Tensor, columns: _Columns) -> Tensor:
        """[X, P, L]: slots for each local expert, in the order in which the chunks arrive."""
        return counts_SE[:, columns.local].reshape(self.ep_size, self.tp_size, -1).transpose(0, 1)

    def _aligned(self, counts: Tensor) -> Tensor:
        return -(-counts // self.align) * self.align

    def _pad(self, gates_TE: Tensor, map_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Fill each expert's slots up to the alignment of the quantised GEMM, with gate 0."""
        align = self.align
        if map_TE.shape[0] % align:
            raise ValueError(
                f"{map_TE.shape[0]} local tokens are no multiple of the alignment {align} of the quantised experts, so "
                f"slots cannot be padded to it; make micro-batch x sequence / (TP x CP) a multiple of {align}, or "
                "drop --moe-router-padding-for-quantization"
            )
        # Upstream pads in place: a copy keeps the decision, and with it every count of real slots, as it was.
        padded_TE = pad_routing_map(map_TE.clone(), align)
        return gates_TE.masked_fill(~map_TE, 0), padded_TE

    def has_kernels(self, tensor: Tensor) -> bool:
        """Whether slots are laid out by our own kernels; Transformer Engine's come first."""
        return not self.config.moe_permute_fusion and has_kernels(self.config.anyexperts_kernels, tensor)

    def _permute(
        self, hidden_TH: Tensor, map_TE: Tensor, gates_TE: Tensor, counts_E: Tensor, slots: int
    ) -> tuple[Tensor, ...]:
        """Slots sorted by expert, their gates, and the permutation that `unpermute` reverts."""
        if self.config.moe_permute_fusion:
            return permute(hidden_TH, map_TE, probs=gates_TE, num_out_tokens=slots, fused=True)[:3]
        if self.has_kernels(hidden_TH):
            return fused_permute.permute(hidden_TH, gates_TE, map_TE, counts_E, slots)
        # The stock unfused path sorts all T x E flags; the number of slots is known here, so finding them is enough.
        expert_N, token_N = torch.nonzero_static(map_TE.T, size=slots).unbind(1)
        # Flat, because the backward of an index of two tensors sorts them on a GPU.
        place_N = torch.add(expert_N, token_N, alpha=map_TE.shape[1])
        return hidden_TH.index_select(0, token_N), gates_TE.reshape(-1).gather(0, place_N), token_N

    def _gather_tp(self, x: Tensor, tp_splits: list[int]) -> Tensor:
        # An uneven all-gather written as an all-to-all: the same traffic, and gloo can do it too.
        if self.tp_size == 1:
            return x
        copies = x.expand(self.tp_size, *x.shape).flatten(0, 1)
        return all_to_all(self.tp_group, copies, tp_splits, [x.shape[0]] * self.tp_size)

    def _reduce_tp(self, x: Tensor, route: _Route) -> Tensor:
        if self.tp_size == 1:
            return x
        own = sum(route.output_splits)
        parts = all_to_all(self.tp_group, x, [own] * self.tp_size, route.tp_splits)
        return parts.view(self.tp_size, own, *x.shape[1:]).to(route.gate_dtype).sum(0).to(x.dtype)
