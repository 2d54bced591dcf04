"""Temporary copies of other ranks' experts: weights come in, outputs are computed, weight gradients go home.

Forward: owners send the weights of the experts that the plan copies, in one all-to-all that runs while own experts are
computed, and the copies' slots go through them. Their memory is then given back.

Backward: the weights are sent again, to where the forward pass had them, unless they are kept for a step
(`anyexperts_copies_refresh`). When copies and own experts are done, the
weight gradients go back in one all-to-all, and the owner adds them in the order of ranks, in fp32 where the parameter
has an fp32 `main_grad`. That is after its own GEMMs, which overwrite it in the first microbatch of a step where they
write to it themselves, and before the parameter counts as ready, which waits for both.

Shapes: `R` places for copies on a rank, `C` experts that it lends, `N` elements of one expert's weights, `M` slots that
arrived for copies, `H` hidden.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

if TYPE_CHECKING:
    from megatron_anyexperts.moe.config import AnyExpertsConfig
    from megatron_anyexperts.moe.copies import CopyPlan

_NUMBER_OF_EXPERT = re.compile(r"local_experts\.(\d+)\.|\.(?:weight|bias)(\d+)$")


@dataclass(frozen=True)
class Journey:
    """What a rank sends and receives under a plan.

    Attributes:
        lent: local indices of the experts it sends, by receiving rank.
        lent_splits: how many of them go to each rank.
        borrowed_splits: copies it receives from each rank; they arrive in the order of their places.
    """

    lent: list[int]
    lent_splits: list[int]
    borrowed_splits: list[int]


def journey(plan: CopyPlan, local: int, rank: int, ranks: int) -> Journey:
    """This rank's part of a plan.

    Args:
        plan: the same on all ranks.
        local: experts that a rank owns.
        rank, ranks: of the expert-parallel group.
    """
    owner_G = plan.expert_G // local
    lent_G = (owner_G == rank) & (plan.rank_G != rank)
    borrowed_G = (owner_G != rank) & (plan.rank_G == rank)
    by_rank = np.argsort(plan.rank_G[lent_G], kind="stable")
    return Journey(
        (plan.expert_G[lent_G] % local)[by_rank].tolist(),
        np.bincount(plan.rank_G[lent_G], minlength=ranks).tolist(),
        np.bincount(owner_G[borrowed_G], minlength=ranks).tolist(),
    )


class ExpertCopies:
    """What one rank computes of other ranks' experts; owns no parameters.

    Args:
        experts: Megatron's experts of this rank, which it lends.
        build: makes another such module, given the number of experts and a configuration.
        config: an `AnyExpertsConfig`. Read: `anyexperts_copies_per_rank`, `gradient_accumulation_fusion`.
        ep_group: expert-parallel group.
    """

    def __init__(
        self,
        experts: torch.nn.Module,
        build: Callable[[int, AnyExpertsConfig], torch.nn.Module],
        config: AnyExpertsConfig,
        ep_group: torch.distributed.ProcessGroup,
    ) -> None:
        self.experts, self.group = experts, ep_group
        self.local, self.places = experts.num_local_experts, config.anyexperts_copies_per_rank
        self.fused_gradients = config.gradient_accumulation_fusion
        guest_config = copy.copy(config)
        guest_config.perform_initialization = False  # weights come from the owners, and no random number is drawn
        guest_config.disable_parameter_transpose_cache = True  # a place holds another expert each time
        guest_config.fine_grained_activation_offloading = False
        self.guests = build(self.places, guest_config)
        self.shapes = [(name, parameter.shape) for name, parameter in _by_expert(self.guests)]
        for parameter in self.guests.parameters():
            parameter.data = parameter.data.new_empty(0)
        self.size = sum(shape.numel() for _, shape in self.shapes) // self.places
        self._names = [name for name, _ in _by_expert(experts)]
        self._kept_RN: Tensor | None = None

    @property
    def own(self) -> list[torch.nn.Parameter]:
        """The parameters of this rank's experts, expert by expert."""
        # Looked up each time: a model built on the meta device gets others when it is given memory.
        return [self.experts.get_parameter(name) for name in self._names]

    def fetch(self, plan: CopyPlan, keep: bool = False) -> Fetched:
        """Start the exchange of weights; collective, with any number of experts to send or receive, also none.

        Args:
            plan: the same on all ranks.
            keep: whether weights stay until `forget`, and are there already if they were kept; then all plans until
                `forget` have their copies in the same places.
        """
        way = journey(plan, self.local, self.group.rank(), self.group.size())
        if keep and self._kept_RN is not None:
            return Fetched(way, self._kept_RN, None, None, keep)
        self._await_parameters()
        fetched = self.send(way, self.own[0].detach().new_empty(self.places, self.size))
        if keep:
            fetched.kept, self._kept_RN = True, fetched.weights_RN
        return fetched

    def forget(self) -> None:
        """Give back weights that were kept; when all backward passes that use them are done."""
        self._kept_RN = None

    def send(self, way: Journey, weights_RN: Tensor) -> Fetched:
        """Start the exchange of weights into a buffer; collective."""
        own, borrowed = self.own, sum(way.borrowed_splits)
        lent = [parameter.detach().flatten() for expert in way.lent for parameter in own[self._of(expert)]]
        lent_CN = torch.cat(lent).view(-1, self.size) if lent else weights_RN.new_empty(0, self.size)
        target_RN = weights_RN.data  # not a change that autograd should see: the same values come again
        target_RN[borrowed:] = 0
        work = torch.distributed.all_to_all_single(
            target_RN[:borrowed], lent_CN, way.borrowed_splits, way.lent_splits, group=self.group, async_op=True
        )
        return Fetched(way, weights_RN, lent_CN, work)

    def lend(self, fetched: Fetched | None, own_NH: Tensor, borrowed_MH: Tensor) -> tuple[Tensor, Tensor]:
        """Slots of own experts and of copies, unchanged, to be computed with; the backward pass is collective.

        Every rank calls it once for each layer and microbatch, and computes with what it returns. Without copies, and
        then without an exchange, too: parameters become ready in another order with it, and data-parallel replicas, of
        which some have copies and some not, would reduce their gradients in different orders.

        Args:
            fetched: what `fetch` returned; None without copies.
        """
        return _Lend.apply(self, fetched, own_NH, borrowed_MH, *self.own)

    def __call__(self, fetched: Fetched, slots_MH: Tensor, tokens_per_copy: Tensor, gates_M: Tensor) -> Tensor:
        """[M, H], outputs for slots that arrived for copies; differentiable, its backward pass is collective.

        Args:
            fetched: what `fetch` returned; every rank calls this once for each fetch.
            slots_MH: [M, H], as `lend` returned them, sorted by the copy's place; M may be 0.
            tokens_per_copy: int64 [R] on the CPU, 0 for a place without a copy.
            gates_M: [M], as the experts take them.
        """
        trained = torch.is_grad_enabled()  # which autograd does not tell a function
        return _Compute.apply(self, fetched, tokens_per_copy, trained, slots_MH, gates_M)

    def run(self, weights: list[Tensor], slots_MH: Tensor, tokens_per_copy: Tensor, gates_M: Tensor) -> Tensor:
        """The experts' forward pass with `weights` in place of the module's own."""
        named = {name: weight for (name, _), weight in zip(self.shapes, weights, strict=True)}
        return torch.func.functional_call(self.guests, named, (slots_MH, tokens_per_copy, gates_M))[0]

    def views(self, flat_RN: Tensor) -> list[Tensor]:
        """A flat buffer as the weights of all places, in the order of `shapes`."""
        parts = flat_RN.flatten().split([shape.numel() for _, shape in self.shapes])
        return [part.view(shape) for part, (_, shape) in zip(parts, self.shapes, strict=True)]

    def gradient_buffer(self, weights: list[Tensor]) -> Tensor | None:
        """[R, N] fp32, where GEMMs that add gradients to `main_grad` themselves add those of `weights`; else None.

        Layers take it in their forward pass, so it is made there, and has memory in the backward pass only.
        """
        if not self.fused_gradients:
            return None
        grad_RN = torch.empty(self.places, self.size, dtype=torch.float32, device=weights[0].device)
        for weight, part in zip(weights, self.views(grad_RN), strict=True):
            weight.main_grad = part
        _release(grad_RN)
        return grad_RN

    def bring_home(self, way: Journey, grad_RN: Tensor) -> list[Tensor | None]:
        """Send gradients of copies to the owners; collective.

        Returns:
            Gradients of `own`; None for parameters that were not lent, and for those whose `main_grad` took it.
        """
        home_CN = grad_RN.new_empty(len(way.lent), self.size)
        torch.distributed.all_to_all_single(
            home_CN, grad_RN[: sum(way.borrowed_splits)], way.lent_splits, way.borrowed_splits, group=self.group
        )
        own = self.own
        sums: list[Tensor | None] = [None] * len(own)
        sizes = [parameter.numel() for parameter in own[self._of(0)]]
        for expert, row_N in zip(way.lent, home_CN, strict=True):
            for number, part in enumerate(row_N.split(sizes), start=self._of(expert).start):
                parameter = own[number]
                if getattr(parameter, "main_grad", None) is not None:
                    parameter.main_grad.add_(part.view_as(parameter))
                else:
                    part = part.float().view_as(parameter)
                    sums[number] = part if sums[number] is None else sums[number] + part
        return [None if total is None else total.to(own[0].dtype) for total in sums]

    def _await_parameters(self) -> None:
        # With overlapped gathers of parameters (--overlap-param-gather) a module waits for its own when it is called,
        # and weights are lent before.
        for module in self.experts.modules():
            for hook in module._forward_pre_hooks.values():
                if hook.__module__ == DistributedDataParallel.__module__:
                    hook(module)

    def _of(self, expert: int) -> slice:
        """The parameters of one local expert among `own`."""
        per_expert = len(self._names) // self.local
        return slice(expert * per_expert, (expert + 1) * per_expert)


@dataclass
class Fetched:
    """Weights on their way, and what becomes of them.

    Attributes:
        way: what is sent and received.
        weights_RN: in the parameter dtype, 0 in places without a copy; complete after `wait`.
        lent_CN: what is sent; None from then on.
        work: the exchange; None where an earlier one brought the weights.
        kept: whether the weights stay when they have been used.
        grad_RN: gradients of the weights, once the copies' backward pass is done.
    """

    way: Journey
    weights_RN: Tensor
    lent_CN: Tensor | None
    work: torch.distributed.Work | None
    kept: bool = False
    grad_RN: Tensor | None = None

    def wait(self) -> Tensor:
        """[R, N], the weights of the copies."""
        if self.work is not None:
            self.work.wait()
        self.lent_CN = self.work = None
        return self.weights_RN


class _Lend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, copies: ExpertCopies, fetched: Fetched | None, own_NH, borrowed_MH, *own):
        ctx.copies, ctx.fetched = copies, fetched
        return own_NH.view_as(own_NH), borrowed_MH.view_as(borrowed_MH)

    @staticmethod
    def backward(ctx, grad_NH: Tensor, grad_MH: Tensor):
        own, fetched = [None] * (len(ctx.needs_input_grad) - 4), ctx.fetched
        if fetched is not None:
            if any(ctx.needs_input_grad[4:]):
                own = ctx.copies.bring_home(fetched.way, fetched.grad_RN)
            fetched.grad_RN = None
        return None, None, grad_NH, grad_MH, *own


class _Compute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, copies: ExpertCopies, fetched: Fetched, tokens_per_copy, trained: bool, slots_MH, gates_M):
        ctx.copies, ctx.fetched = copies, fetched
        weights_RN = fetched.wait()
        with torch.set_grad_enabled(trained):
            ctx.inputs = [x.detach().requires_grad_(trained) for x in (slots_MH, gates_M, *copies.views(weights_RN))]
            slots, gates, *weights = ctx.inputs
            ctx.grad_RN = copies.gradient_buffer(weights) if trained else None
            ctx.output_MH = copies.run(weights, slots, tokens_per_copy, gates)
        if not fetched.kept:
            _release(weights_RN)
        return ctx.output_MH.detach()

    @staticmethod
    def backward(ctx, grad_MH: Tensor):
        fetched, grad_RN, (slots_MH, gates_M, *weights) = ctx.fetched, ctx.grad_RN, ctx.inputs
        if not fetched.kept:
            _restore(fetched.weights_RN)
            ctx.copies.send(fetched.way, fetched.weights_RN).wait()
        if grad_RN is not None:
            _restore(grad_RN)
            grad_RN.data.zero_()
        torch.autograd.backward(ctx.output_MH, grad_MH)
        if not fetched.kept:
            _release(fetched.weights_RN)
        if grad_RN is None:
            grad_RN = torch.cat([weight.grad.flatten() for weight in weights]).view(fetched.weights_RN.shape)
        fetched.grad_RN = grad_RN
        ctx.inputs = ctx.output_MH = ctx.grad_RN = None
        return None, None, None, None, slots_MH.grad, gates_M.grad


# As torch's FSDP does: what autograd has saved points to this memory, which is there again when it is read.
def _release(buffer: Tensor) -> None:
    buffer.untyped_storage().resize_(0)


def _restore(buffer: Tensor) -> None:
    buffer.untyped_storage().resize_(buffer.numel() * buffer.element_size())


def _by_expert(experts: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """Names and parameters, expert by expert."""
    named = list(experts.named_parameters())
    matches = [_NUMBER_OF_EXPERT.search(name) for name, _ in named]
    if not all(matches):
        shared = [name for (name, _), match in zip(named, matches, strict=True) if not match]
        raise ValueError(
            f"anyexperts_balance=copies lends single experts, but {shared} of {type(experts).__name__} belong to "
            "several at once; use one parameter per expert (no --moe-single-grouped-weight)"
        )
    numbers = [int(match[1] or match[2]) for match in matches]
    return [named[i] for i in sorted(range(len(named)), key=numbers.__getitem__)]
