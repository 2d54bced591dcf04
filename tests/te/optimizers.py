"""Transformer Engine's operators over lists of tensors, one tensor after the other."""

import torch


def multi_tensor_scale(_chunk, overflow, lists, scale):
    """`lists`: sources and destinations; a value that is not finite sets `overflow`."""
    for source, destination in zip(*lists, strict=True):
        if not source.isfinite().all():
            overflow.fill_(1)
        destination.copy_(source * scale)


def multi_tensor_l2norm(_chunk, _overflow, lists, per_tensor=False):
    """fp32 [1], and [tensors] on request."""
    [tensors] = lists
    norms = torch.stack([tensor.float().norm() for tensor in tensors])
    return norms.norm().view(1), norms if per_tensor else norms.new_zeros(0)


def multi_tensor_adam(_chunk, _overflow, lists, lr, beta1, beta2, eps, step, decoupled, bias_correction, weight_decay):
    """`lists`: gradients, parameters, both moments and, for parameters of low precision, their fp32 masters."""
    first = 1 - beta1 ** float(step) if bias_correction else 1.0
    second = 1 - beta2 ** float(step) if bias_correction else 1.0
    for grad, parameter, mean, square, *master in zip(*lists, strict=True):
        weight = (master[0] if master else parameter).float()
        grad = grad.float() + (0 if decoupled else weight_decay * weight)
        mean.mul_(beta1).add_(grad, alpha=1 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        step_size = (mean / first) / ((square / second).sqrt() + eps) + (weight_decay * weight if decoupled else 0)
        for each in (parameter, *master):
            each.copy_(weight - lr * step_size)


OPERATORS = {
    "multi_tensor_scale": multi_tensor_scale,
    "multi_tensor_scale_tensor": multi_tensor_scale,
    "multi_tensor_l2norm": multi_tensor_l2norm,
    "multi_tensor_adam": multi_tensor_adam,
}
