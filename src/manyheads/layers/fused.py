"""Layers in evaluation as one kernel each: convolution, batch norm and activation, or projection and activation.

    act( BN( W x + c ) ) = act( W' x + c' ),     W' = g W / s,   c' = b + (c - m) g / s,     s = sqrt(v + eps)

A norm in front of a 1 x 1 convolution folds the same way from the other side. Activations run inside oneDNN's kernels.

This happens where nothing can see it but the clock: float32 on a CPU without gradients, autocast, tracing, compiling or
hooks; everywhere else the modules are called as they stand. Parameters, buffers and ``state_dict`` stay as they are.
Folded weights are kept beside the module and made anew as soon as one of their sources is another tensor or was
written to, by the counter that autograd itself trusts (``tensor.data.mul_(2)`` is hidden from both); a call in training
or with gradients drops them.

Sources: "SHViT", arXiv 2401.16456; "LeViT", arXiv 2104.01136 (folding of norms); oneDNN's post-operations.
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from timm.layers import Mlp, SqueezeExcite
from torch import Tensor, nn
from torch.nn.modules import module as _hooks

from manyheads.layers.activations import TanhGELU

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
_ENABLED = ContextVar("fused", default=True)
_AVAILABLE = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
_interpreter = cast(Any, torch._C)._functorch.peek_interpreter_stack
_NONE = ("none", (), "")
_LINEAR: Any = torch.ops.mkldnn._linear_pointwise.default if _AVAILABLE else F.linear
_CONVOLVE: Any = torch.ops.mkldnn._convolution_pointwise.default if _AVAILABLE else F.conv2d
_PACKS = torch.backends.mkl.is_available() and hasattr(torch.ops.mkl, "_mkl_linear")
_LARGE, _NARROW = 1 << 18, 256  # outputs of a product, and width of what is summed, from which oneDNN wins


@contextmanager
def unfused():
    """Call every module as it stands inside this block, for comparisons."""
    token = _ENABLED.set(False)
    try:
        yield
    finally:
        _ENABLED.reset(token)


def fusible(x: Tensor, *modules: nn.Module) -> bool:
    """Whether ``x`` may pass these modules in one kernel with nobody noticing."""
    if (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or type(x) is not Tensor
        or x.dtype is not torch.float32
        or not x.is_cpu
        or not _AVAILABLE
        or not _ENABLED.get()
        or not x.numel()
        or torch.is_autocast_enabled("cpu")
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack()
        or _interpreter() is not None
        or _hooks._global_forward_hooks
        or _hooks._global_forward_pre_hooks
    ):
        return False
    for module in modules:  # noqa: SIM110 (this runs for every layer, and a generator costs a microsecond)
        if module._forward_hooks or module._forward_pre_hooks:
            return False
    return True


def project(linear: Any, x: Tensor, act: nn.Module | None = None) -> Tensor:
    """act(linear(x)) on the last axis.

    >>> import torch
    >>> layer, act, x = torch.nn.Linear(8, 4), torch.nn.GELU(), torch.randn(3, 8)
    >>> with torch.no_grad():
    ...     torch.testing.assert_close(project(layer, x, act), act(layer(x)))
    """
    kernel = _kernel(act)
    if kernel is not None and type(linear) is nn.Linear and fusible(x, linear, *((act,) if act else ())):
        folded = _folded(linear, None, None, False)
        if folded is not None:
            return _matmul(x, folded, kernel)
    if not torch.compiler.is_compiling():
        _KEPT.pop(linear, None)
    x = linear(x)
    return act(x) if act else x


def perceive(mlp: Any, x: Tensor) -> Tensor:
    """timm's ``Mlp``, its activation inside the first product."""
    if type(mlp) is not Mlp or type(mlp.norm) is not nn.Identity or (mlp.training and mlp.drop1.p + mlp.drop2.p):
        return mlp(x)
    if not fusible(x, mlp, mlp.fc1, mlp.act, mlp.fc2):
        return mlp(x)
    return project(mlp.fc2, project(mlp.fc1, x, mlp.act))


def convolve_norm(
    conv: Any,
    norm: nn.Module | None,
    x: Tensor,
    act: nn.Module | None = None,
    *,
    before: nn.Module | None = None,
    residual: bool = False,
    padding: tuple[int, ...] | None = None,
) -> Tensor | None:
    """act(norm(conv(before(x)))) in one kernel, or None where that has to be written out.

    Args:
        conv: a convolution; 1 x 1 is a matrix product on the channels-last map.
        norm: batch norm behind it, or None.
        x: maps (batch, channels, X, Y), best channels-last in memory.
        act: ReLU, SiLU or a GELU; None has none.
        before: a norm in front of a 1 x 1 convolution: batch norm, or group norm whose statistics are already applied.
        residual: add x to the result of the norm (depthwise, stride 1, no activation): 1 on the kernel's centre.
        padding: instead of the convolution's own.

    >>> import torch
    >>> conv, norm, x = torch.nn.Conv2d(4, 8, 3), torch.nn.BatchNorm2d(8).eval(), torch.randn(1, 4, 6, 5)
    >>> with torch.no_grad():
    ...     torch.testing.assert_close(convolve_norm(conv, norm, x), norm(conv(x)))
    """
    modules = tuple(module for module in (conv, norm, before, act) if module is not None)
    kernel = _kernel(act)
    folded = None
    if kernel is not None and fusible(x, *modules):
        folded = _folded(conv, norm, before, residual)
    if folded is None or kernel is None:
        if not torch.compiler.is_compiling():
            _KEPT.pop(conv, None)
        return None
    if folded.geometry is None:
        rows, columns = conv.stride
        x = x if rows == columns == 1 else x[:, :, ::rows, ::columns]
        return _matmul(x.permute(0, 2, 3, 1), folded, kernel).permute(0, 3, 1, 2)
    stride, dilation, groups = folded.geometry
    padding = conv.padding if padding is None else padding
    if folded.packed is None:
        folded.packed = torch.ops.mkldnn._reorder_convolution_weight(
            folded.weight, padding, stride, dilation, groups, list(x.shape)
        )
    return _CONVOLVE(x, folded.packed, folded.bias, padding, stride, dilation, groups, *kernel)


def folded_tokens(conv: Any, norm: Any, x: Tensor, *, before: nn.Module | None = None) -> Tensor | None:
    """:func:`convolve_norm` of a 1 x 1 convolution on (batch, tokens, channels)."""
    out = convolve_norm(conv, norm, x.mT[..., None], before=before)
    return None if out is None else out[..., 0].mT


def add(x: Tensor, branch: Tensor) -> Tensor:
    """x + branch; in evaluation it is written where ``branch``, which nobody else may need, lies."""
    return branch.add_(x) if fusible(branch) and type(x) is Tensor and x.dtype is branch.dtype else x + branch


def excite(module: Any, x: Tensor) -> Tensor:
    """timm's ``SqueezeExcite``, which scales the map where it lies; ``x`` is lost."""
    parts = [child for child in module.children()] if type(module) is SqueezeExcite else []
    if not parts or module.add_maxpool or type(module.bn) is not nn.Identity or not fusible(x, module, *parts):
        return module(x)
    gate = x.mean((2, 3))
    layers: Any = ((module.fc1, module.act), (module.fc2, module.gate))
    for conv, act in layers:
        gate = act(F.linear(gate, conv.weight.flatten(1), conv.bias))
    gate = gate[:, :, None, None]
    return x.mul_(gate) if x.is_contiguous(memory_format=torch.channels_last) else x * gate


@dataclass(eq=False)
class _Folded:
    options: tuple
    sources: list[tuple[dict, str, Tensor | None, int, int]]  # where, name, tensor, its version and address
    norms: list[Any]
    alive: list[Tensor]  # keeps the memory of the sources, so that no other tensor takes its address
    weight: Tensor
    bias: Tensor | None
    geometry: tuple | None  # of a convolution; None for a product
    packed: Any = None  # weights as the kernel wants them; of a product with the number of rows they are for
    rows: int = 0

    def fresh(self) -> bool:
        """Whether the sources are the tensors that were folded, not written to since, and the norms still fixed."""
        for where, name, tensor, version, address in self.sources:
            now = where.get(name)
            if now is not tensor or (now is not None and (now._version != version or now.data_ptr() != address)):
                return False
        return not any(norm.training or norm.eps != eps for norm, eps in self.norms)


_KEPT: WeakKeyDictionary[nn.Module, _Folded] = WeakKeyDictionary()


def _folded(layer: Any, norm: Any, before: Any, residual: bool) -> _Folded | None:
    """The folded weights, kept since the last call or made now."""
    kept = _KEPT.get(layer)
    if kept is not None and kept.options == (norm, before, residual) and kept.fresh():
        return kept
    return _fold(layer, norm, before, residual)


def _fold(conv: Any, norm: Any, before: Any, residual: bool) -> _Folded | None:
    """The folded weights, kept; None if modules or tensors are not the plain ones with fixed statistics."""
    norms = [module for module in (norm, before) if module is not None]
    pointwise = type(conv) is nn.Linear
    if not pointwise:
        if not isinstance(conv, nn.Conv2d) or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            return None
        pointwise = conv.kernel_size == (1, 1) and conv.groups == 1 and conv.padding == (0, 0)
    if before is not None and not pointwise:
        return None
    sources = []
    for module in (conv, *norms):
        fixed = type(module) in _NORMS and not module.training and module.running_mean is not None
        if module is not conv and not fixed and not (module is before and type(module) is nn.GroupNorm):
            return None
        for where, name in [(module._parameters, "weight"), (module._parameters, "bias")] + [
            (module._buffers, name) for name in ("running_mean", "running_var") if fixed
        ]:
            tensor = where.get(name)
            if tensor is None and (name == "bias" or fixed):
                sources.append((where, name, None, 0, 0))
            elif tensor is not None and _plain(tensor):
                sources.append((where, name, tensor, tensor._version, tensor.data_ptr()))
            else:
                return None
    weight, bias = conv.weight.detach(), conv.bias
    if before is not None:
        factor, shift = norm_affine(before)
        shift = weight.flatten(1) @ shift
        weight, bias = weight * factor[:, None, None], shift if bias is None else bias + shift
    if norm is not None:
        factor, shift = norm_affine(norm)
        weight, bias = weight * factor[:, None, None, None], shift if bias is None else shift + factor * bias
    if residual:
        weight = weight.clone()
        weight[:, :, weight.shape[2] // 2, weight.shape[3] // 2] += 1
    _KEPT[conv] = kept = _Folded(
        (norm, before, residual), sources, [(module, module.eps) for module in norms],
        [tensor.detach() for _, _, tensor, _, _ in sources if tensor is not None],
        weight.flatten(1) if pointwise else weight, None if bias is None else bias.detach(),
        None if pointwise else (conv.stride, conv.dilation, conv.groups),
    )  # fmt: skip
    return kept


def _plain(tensor: Tensor) -> bool:
    """Whether a tensor is an ordinary one of the kind that kernels here read, with a version to go by."""
    ordinary = type(tensor) in (Tensor, nn.Parameter) and not tensor.is_inference()
    return ordinary and tensor.dtype is torch.float32 and tensor.is_cpu


def norm_affine(norm: Any) -> tuple[Tensor, Tensor]:
    """Factor and shift of a norm whose statistics are fixed (batch norm) or already applied (group norm)."""
    if type(norm) not in _NORMS:
        return norm.weight, norm.bias
    factor = (norm.running_var + norm.eps).rsqrt()
    factor = factor if norm.weight is None else factor * norm.weight
    return factor, -norm.running_mean * factor if norm.bias is None else norm.bias - norm.running_mean * factor


def _kernel(act: nn.Module | None) -> tuple | None:
    """oneDNN's name of an activation; None for one that it does not have."""
    if act is None or type(act) is nn.Identity:
        return _NONE
    if type(act) is nn.GELU:
        return ("gelu", (), act.approximate)
    return _KERNELS.get(type(act))


_KERNELS = {nn.ReLU: ("relu", (), ""), nn.SiLU: ("swish", (), ""), TanhGELU: ("gelu", (), "tanh")}
_IN_PLACE: dict[tuple, Any] = {
    _NONE: lambda x: x,
    _KERNELS[nn.ReLU]: F.relu_,
    _KERNELS[nn.SiLU]: partial(F.silu, inplace=True),
    _KERNELS[TanhGELU]: TanhGELU(),
    ("gelu", (), "none"): torch.ops.aten.gelu_,
}


def _matmul(x: Tensor, folded: _Folded, kernel: tuple) -> Tensor:
    weight, bias = folded.weight, folded.bias
    rows = x.numel() // weight.shape[1]
    size = rows * weight.shape[0]
    # oneDNN saves the passes over the output for bias and activation but takes 50 microseconds to start.
    if size >= _LARGE and (kernel[0] == "gelu" or (weight.shape[1] <= _NARROW and size >= 2 * _LARGE)):
        return _LINEAR(x, weight, bias, *kernel)
    packed = folded.packed
    if packed is not None and packed[0] == rows:
        x = torch.ops.mkl._mkl_linear(x, packed[1], weight, bias, rows)
    else:
        # MKL packs weights for a number of rows: worth the while once that number comes back.
        if _PACKS and rows > 1 and rows == folded.rows:
            folded.packed = rows, torch.ops.mkl._mkl_reorder_linear_weight(weight, rows)
        folded.rows = rows
        x = F.linear(x, weight, bias)
    return _IN_PLACE[kernel](x)
