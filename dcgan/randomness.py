"""Random numbers that belong to one GAN: the process's own generators are neither read, seeded nor restored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

TAKE_GENERATOR: frozenset[Any] = frozenset(
    [torch.randn, torch.rand, torch.randint, torch.randperm, torch.normal, torch.bernoulli, torch.multinomial]
    + [getattr(Tensor, f"{name}_") for name in
       ("normal", "uniform", "bernoulli", "random", "exponential", "cauchy", "log_normal", "geometric")]
    + [torch.poisson, Tensor.bernoulli, Tensor.multinomial, nn.init.uniform_, nn.init.normal_, nn.init.trunc_normal_]
    + [nn.init.kaiming_uniform_, nn.init.kaiming_normal_, nn.init.xavier_uniform_, nn.init.xavier_normal_]
)  # fmt: skip
LIKE = {torch.randn_like: torch.randn, torch.rand_like: torch.rand, torch.randint_like: torch.randint}


def make_generator(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator of random numbers on a device, seeded."""
    return torch.Generator(device).manual_seed(seed)


class draws_from(TorchFunctionMode):  # used as a function: `with draws_from(generator):`
    """Let every random call of torch in this thread take its numbers from `generator`, Dropout's included.

    Other threads are untouched. A call that names its own generator, or runs on another kind of device, is left alone;
    so are functions that hide what they draw: alpha_dropout, rrelu, gumbel_softmax, attention's dropout.
    """

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.generator = generator

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run `func`, with this mode's generator where it draws."""
        kwargs = dict(kwargs or {})
        if func in TAKE_GENERATOR or func in LIKE or func in DROPOUTS:
            given = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
            device = kwargs.get("device") or (given.device if given is not None else torch.get_default_device())
            if torch.device(device).type == self.generator.device.type:
                return self.draw(func, args, kwargs)
        return func(*args, **kwargs)

    def draw(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what a random function makes of its arguments and this generator's numbers."""
        if func in DROPOUTS:
            kwargs = {{"input": "x", "train": "training"}.get(name, name): value for name, value in kwargs.items()}
            return dropout(self.generator, DROPOUTS[func], *args, **kwargs)
        if func in LIKE:
            like, *bounds = (*args, *(kwargs.pop(name) for name in ("input", "low", "high") if name in kwargs))
            kwargs = {"dtype": like.dtype, "device": like.device, **kwargs}
            kwargs.pop("memory_format", None)
            return LIKE[func](*bounds, like.shape, generator=self.generator, **kwargs)
        return func(*args, **{"generator": self.generator, **{k: v for k, v in kwargs.items() if v is not None}})


# leading dimensions that decide for all behind them; 0: each entry decides for itself
DROPOUTS = {F.dropout: 0, torch.dropout: 0, F.dropout1d: 2, F.dropout2d: 2, F.dropout3d: 2}


def dropout(
    generator: torch.Generator, shared: int, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    """Return x with a share p of its entries set to 0 and the rest scaled up, as `F.dropout` does.

    shared: see DROPOUTS. On a CPU the share is exact to a 65,536th: 16-bit numbers, four from each draw, take a
    quarter of the time of `bernoulli_`.
    """
    if not training or not p:
        return x
    mask = torch.empty_like(x[(..., *[slice(0, 1)] * (x.ndim - shared))] if shared else x, requires_grad=False)
    if x.device.type != "cpu" or p == 1:
        mask.bernoulli_(1 - p, generator=generator).div_(max(1 - p, 1e-12))
    else:
        kept = min(max(1, round((1 - p) * 65536)), 65535)
        draw = torch.empty(-(-mask.numel() // 4), dtype=torch.int64).random_(-(2**63), None, generator=generator)
        flags = draw.view(torch.int16)[: mask.numel()].lt_(kept - 32768)
        mask.copy_(flags.as_strided(mask.size(), mask.stride())).mul_(65536 / kept)  # empty_like leaves no gaps
    return x.mul_(mask) if inplace else x * mask
