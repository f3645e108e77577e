"""A CPU's faster convolutions, put on networks from outside: the same parameters, the same mathematics."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .networks import ClassConditional


def cpu_features() -> dict[str, Any]:
    """Return what torch knows of this CPU's instructions."""
    return getattr(torch.cpu, "get_capabilities", dict)()


def accelerate(network: nn.Module) -> nn.Module:
    """Return a module that computes what `network` does, faster on a CPU, with its parameters and buffers.

    Convolutions choose their way, see `FastConv`; a Sequential with TensorFlow's "same" padding works on mirrored maps.
    Everything else, networks of one's own included, is left as it is and shared, modes and averages too.
    """
    if type(network) in CONVS:
        return FastConv(network) if has_fast_form(network) else network
    if type(network) is nn.Sequential and pads_like_tensorflow(network):
        return Mirrored(network)
    if not (type(network) is nn.Sequential or type(network).__module__ == ClassConditional.__module__):
        return network
    fast = copy.copy(network)
    fast._modules = {name: child and accelerate(child) for name, child in network._modules.items()}
    return fast


CONVS = (nn.Conv2d, nn.ConvTranspose2d)
POINTWISE = (nn.BatchNorm2d, nn.ReLU, nn.LeakyReLU, nn.Tanh, nn.Dropout, nn.Identity)


def has_fast_form(conv: nn.Conv2d | nn.ConvTranspose2d) -> bool:
    """Return whether `FastConv` computes what this convolution does, and no hook waits for its call."""
    k, stride, padding = (pair[0] for pair in (conv.kernel_size, conv.stride, conv.padding))
    square = all(pair[0] == pair[1] for pair in (conv.kernel_size, conv.stride, conv.padding))
    plain = conv.dilation == (1, 1) and conv.groups == 1 and conv.padding_mode == "zeros"
    hooks = conv._forward_hooks or conv._forward_pre_hooks or conv._backward_hooks or conv._backward_pre_hooks
    fits = padding == (k - 1) // 2 and stride in (1, 2) and stride <= k
    if isinstance(conv, nn.ConvTranspose2d):
        fits = fits and conv.output_padding == (stride + 2 * padding - k,) * 2
    return square and plain and not hooks and (fits or (padding == 0 and stride == 1))


def pads_like_tensorflow(layers: nn.Sequential) -> bool:
    """Return whether kernels 5 of stride 2 are padded as TensorFlow does, and the other layers treat sides alike."""
    found = []
    for before, layer, after in zip([None, *layers], layers, [*layers, None][1:], strict=False):
        if type(layer) in CONVS and layer.stride == (2, 2):
            pad, sides = (before, (0, 1, 0, 1)) if type(layer) is nn.Conv2d else (after, (0, -1, 0, -1))
            plain = layer.dilation == (1, 1) and layer.groups == 1 and layer.padding_mode == "zeros"
            padded = type(pad) is nn.ZeroPad2d and pad.padding == sides and layer.padding == (1, 1) and plain
            found.append(padded and layer.kernel_size == (5, 5))
        elif type(layer) is nn.Conv2d:
            found.append(has_fast_form(layer) and layer.padding != (0, 0))
        elif type(layer) is not nn.ZeroPad2d and type(layer) not in POINTWISE:
            return False
    pads = sum(type(layer) is nn.ZeroPad2d for layer in layers)
    return pads > 0 and all(found) and pads == sum(getattr(layer, "stride", None) == (2, 2) for layer in layers)


class Mirrored(nn.Module):
    """Run a Sequential on mirrored maps, where TensorFlow's padding (1 before, 2 after) is PyTorch's (2 and 1).

    So no map is copied only to be padded or cropped; kernels are mirrored instead, which are small.
    """

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        kept = [layer for layer in layers if not isinstance(layer, nn.ZeroPad2d)]
        self.layers = nn.Sequential(*(FastConv(m, mirrored=True) if type(m) in CONVS else m for m in kept))

    def forward(self, x: Tensor) -> Tensor:
        """Return the layers' maps for x (N, C, H, W)."""
        return self.layers(x.flip(2, 3)).flip(2, 3)


class FastConv(nn.Module):
    """Run a convolution with the weights of `conv`, each of its three passes in the way that is fastest for it.

    `conv` has padding (k - 1) // 2 and stride 1 or 2, or turns a point into a map or back. mirrored: maps are mirrored
    and so must the kernel be; stride 2 then pads 2 before and 1 after.
    """

    def __init__(self, conv: nn.Conv2d | nn.ConvTranspose2d, mirrored: bool = False) -> None:
        super().__init__()
        self.conv, self.mirrored = conv, mirrored
        self.transposed = isinstance(conv, nn.ConvTranspose2d)

    def forward(self, x: Tensor) -> Tensor:
        """Return what the convolution makes of x (N, C, H, W), in the precision that autocast asks for."""
        conv, k, stride = self.conv, self.conv.kernel_size[0], self.conv.stride[0]
        weight, bias, task = conv.weight, conv.bias, "transpose" if self.transposed else "convolve"
        if conv.padding[0] == 0:
            return self._point(x, weight) if bias is None else conv(x)
        if self.mirrored:
            weight = weight.to(computed_dtype(x)).flip(2, 3)  # half as much to turn around in bf16
        taps = weight
        if task == "convolve" and stride == 1 and len(weight) == 1:  # one output map: the transpose of a gray input
            task, taps = "transpose", weight.flip(2, 3).transpose(0, 1)
        ways = fastest_ways(x, taps)
        if not any(ways) or (x.shape[2] % stride or x.shape[3] % stride):
            task = "transpose" if self.transposed else "convolve"
            return LIBRARY[task](x, weight, k, stride, bias)
        dtype = computed_dtype(x)
        maps = ConvPass.apply(task, x.to(dtype), taps.to(dtype), None, k, stride, ways)
        return maps if bias is None else maps + bias.to(dtype)[:, None, None]

    def _point(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return the product that a convolution between a point and a map of the kernel's side is."""
        if self.transposed and x.shape[2:] == (1, 1):
            maps = x.flatten(1) @ weight.permute(0, 2, 3, 1).flatten(1)
            return maps.unflatten(1, (*self.conv.kernel_size, -1)).permute(0, 3, 1, 2)
        if not self.transposed and x.shape[2:] == self.conv.kernel_size:
            maps, weight = (tensor.permute(0, 2, 3, 1).flatten(1) for tensor in (x, weight))
            return (maps @ weight.T)[:, :, None, None]
        return self.conv(x)


class ConvPass(torch.autograd.Function):
    """Take one pass through a convolution with weights (A, B, k, k) between y (N, A, H, W) and x (N, B, sH, sW).

    convolve: x and weights to y, as Conv2d with stride s and padding (k - 1) // 2. transpose: y and weights to x.
    weight: y and x to the gradient by the weights. Each is linear in both inputs, and they are one another's
    derivatives: so every pass goes the way that is fastest for it, and can be differentiated again.
    """

    @staticmethod
    def forward(
        ctx: Any, task: str, first: Tensor, second: Tensor, cut: Tensor | None, k: int, stride: int, ways: frozenset
    ) -> Tensor:
        """Return what the task makes of its two inputs; cut: the patches of x, where they are at hand."""
        ctx.task, ctx.how = task, (k, stride, ways)
        if task == "convolve" and cut is None and ctx.needs_input_grad[2]:
            cut = shared_patches(first, *ctx.how)
        ctx.save_for_backward(first, second, cut)
        if task in ways:
            return PATCHES[task](first, second, k, stride, *([] if cut is None else [cut]))
        return LIBRARY[task](first, second, k, stride)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the derivatives by both inputs."""
        first, second, cut = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        needs = ctx.needs_input_grad[1:3]
        if ctx.task == "transpose" and all(needs):
            cut = shared_patches(gradient, *ctx.how)
        asked = {
            "convolve": (("transpose", gradient, second, None), ("weight", gradient, first, cut)),
            "transpose": (("convolve", gradient, second, cut), ("weight", first, gradient, cut)),
            "weight": (("convolve", second, gradient, cut), ("transpose", first, gradient, None)),
        }[ctx.task]
        found = [ConvPass.apply(*what, *ctx.how) if need else None for what, need in zip(asked, needs, strict=True)]
        return None, *found, None, None, None, None


def fastest_ways(x: Tensor, weight: Tensor) -> frozenset[str]:
    """Return the passes of a convolution with weights (A, B, k, k), of A or B maps x, that are faster as a product.

    A product of patches: for gray images everywhere; with AMX, where products cost little and moving data counts, for
    many small maps. Else, on other devices and with other memory formats, the library's convolution is faster.
    """
    narrow, k = min(weight.shape[:2]), weight.shape[2]
    if x.device.type != "cpu" or not x.is_contiguous(memory_format=torch.channels_last):
        return frozenset()
    if weight.shape[1] == 1:
        return frozenset(PATCHES)
    side = min(x.shape[2:]) // (1 if x.shape[1] == weight.shape[0] else 2)  # of the smaller maps
    if computed_dtype(x) != torch.bfloat16 or not cpu_features().get("amx_bf16") or side > 8 or narrow < 125:
        return frozenset()
    return frozenset(PATCHES if k == 4 and narrow >= 250 else ("convolve", "weight"))


def computed_dtype(x: Tensor) -> torch.dtype:
    """Return the type in which a convolution of x is computed: autocast's, where that is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def library_convolve(x: Tensor, weight: Tensor, k: int, stride: int, bias: Tensor | None = None) -> Tensor:
    """Return the library's convolution."""
    return F.conv2d(x, weight, bias, stride, padding=(k - 1) // 2)


def library_transpose(y: Tensor, weight: Tensor, k: int, stride: int, bias: Tensor | None = None) -> Tensor:
    """Return the library's transposed convolution."""
    padding = (k - 1) // 2
    return F.conv_transpose2d(y, weight, bias, stride, padding, output_padding=stride + 2 * padding - k)


def library_weight(y: Tensor, x: Tensor, k: int, stride: int) -> Tensor:
    """Return the library's gradient by the weights."""
    return torch.nn.grad.conv2d_weight(x, (y.shape[1], x.shape[1], k, k), y, stride, padding=(k - 1) // 2)


@torch.no_grad()  # x and y are differentiated, however often
def shared_patches(x: Tensor, k: int, stride: int, ways: frozenset[str]) -> Tensor | None:
    """Return the patches of x where two passes take them, else None."""
    return patches(x, k, stride) if {"convolve", "weight"} <= ways else None


def patches(x: Tensor, k: int, stride: int) -> Tensor:
    """Return the k×k patches of maps (N, B, sH, sW) as a matrix (N·H·W, k²·B)."""
    before, after = (k - 1) // 2, k - stride - (k - 1) // 2
    x = F.pad(x.permute(0, 2, 3, 1), (0, 0, before, after, before, after))
    if x.shape[3] > 1:
        return x.unfold(1, k, stride).unfold(2, k, stride).permute(0, 1, 2, 4, 5, 3).flatten(3).flatten(0, 2)
    columns = torch.stack(every(x[..., 0], 2, k, stride))
    return torch.stack(every(columns, 2, k, stride)).flatten(0, 1).flatten(1).T  # the pixels of a tap in one row


def every(x: Tensor, dim: int, k: int, stride: int) -> list[Tensor]:
    """Return for each of k taps the view of a padded x that it meets along one dimension."""
    length = x.shape[dim] - k + 1
    return [x.narrow(dim, tap, length)[(slice(None),) * dim + (slice(None, None, stride),)] for tap in range(k)]


def rows_of(y: Tensor) -> Tensor:
    """Return maps (N, A, H, W) as a matrix (N·H·W, A)."""
    return y.permute(0, 2, 3, 1).flatten(0, 2)


def patches_convolve(x: Tensor, weight: Tensor, k: int, stride: int, cut: Tensor | None = None) -> Tensor:
    """Return the convolution as one product of patches and weights."""
    maps = (patches(x, k, stride) if cut is None else cut) @ weight.permute(0, 2, 3, 1).flatten(1).T
    height, width = (side // stride for side in x.shape[2:])
    return maps.view(len(x), height, width, len(weight)).permute(0, 3, 1, 2)


def patches_transpose(y: Tensor, weight: Tensor, k: int, stride: int) -> Tensor:
    """Return maps (N, B, sH, sW), each entry the sum of what up to k² patches give it, added in float32."""
    (n, _, height, width), maps, before = y.shape, weight.shape[1], (k - 1) // 2
    if maps == 1:
        taps = (weight.flatten(1).T @ rows_of(y).T).view(k, k, n, height, width, 1)
    else:
        taps = (rows_of(y) @ weight.permute(0, 2, 3, 1).flatten(1)).view(n, height, width, k, k, maps)
        taps = taps.permute(3, 4, 0, 1, 2, 5)
    exact = taps.to(torch.promote_types(taps.dtype, torch.float32))
    columns = exact.new_zeros(k, n, (height - 1) * stride + k, width, maps)
    x = columns.new_zeros(n, (height - 1) * stride + k, (width - 1) * stride + k, maps)
    for total, dim, parts in ((columns, 2, exact), (x, 2, columns)):
        for place, part in zip(every(total, dim, k, stride), parts, strict=True):
            place += part
    x = x[:, before : before + stride * height, before : before + stride * width]
    return x.to(taps.dtype).contiguous().permute(0, 3, 1, 2)


def patches_weight(y: Tensor, x: Tensor, k: int, stride: int, cut: Tensor | None = None) -> Tensor:
    """Return the gradient by the weights as one product of maps and patches."""
    cut, maps = patches(x, k, stride) if cut is None else cut, rows_of(y).T
    if x.shape[1] > 1:  # products of a matrix that lies the other way take twice as long; gray patches lie that way
        maps = maps.contiguous()
    return (maps @ cut).unflatten(1, (k, k, -1)).permute(0, 3, 1, 2)


LIBRARY = {"convolve": library_convolve, "transpose": library_transpose, "weight": library_weight}
PATCHES = {"convolve": patches_convolve, "transpose": patches_transpose, "weight": patches_weight}
