"""Activations under the names that transformers gives them in `activation_function`."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import GELU_NEW


class NewGELU(nn.Module):
    """gelu_new(x) = x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3))), Hendrycks and Gimpel 2016, section 2."""

    def forward(self, input: Tensor) -> Tensor:
        """Elementwise, of any shape."""
        return F.gelu(input, approximate="tanh")


class Elementwise(nn.Module):
    """A function of each element, under its name."""

    def __init__(self, name: str, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.name, self.function = name, function

    def forward(self, input: Tensor) -> Tensor:
        """Elementwise, of any shape."""
        return self.function(input)

    def extra_repr(self) -> str:
        return self.name


class XIELU(nn.Module):
    """xIELU with shapes that are trained, in bfloat16 whatever the model is in; Huang and Schlag 2024, "Deriving Activation
    Functions Using Integration", section 3.2.

    a_p x^2 + b x above 0, a_n (e^min(x, eps) - 1 - x) + b x elsewhere; a_p = softplus(alpha_p), a_n = b + softplus(alpha_n).
    """

    alpha_p: Tensor
    alpha_n: Tensor
    beta: Tensor
    eps: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("alpha_p", "alpha_n"):
            self.register_parameter(name, nn.Parameter(torch.empty(1, dtype=torch.bfloat16)))
        for name in ("beta", "eps"):
            self.register_buffer(name, torch.empty((), dtype=torch.bfloat16))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """a_p = a_n = 0.8, b = 0.5, eps = -1e-6."""
        with torch.no_grad():
            for alpha, value in ((self.alpha_p, 0.8), (self.alpha_n, 0.8 - 0.5)):
                alpha.fill_(torch.tensor(value, dtype=torch.bfloat16, device="cpu").expm1().log().item())
            self.beta.fill_(0.5)
            self.eps.fill_(-1e-6)

    def forward(self, input: Tensor) -> Tensor:
        """Elementwise, of any shape; of float16 it gives float32, as in transformers."""
        a_p, a_n = F.softplus(self.alpha_p), self.beta + F.softplus(self.alpha_n)
        below = (torch.expm1(torch.min(input, self.eps)) - input) * a_n
        return torch.where(input > 0, a_p * input * input, below) + self.beta * input


def _clipped(x: Tensor) -> Tensor:
    return torch.clip(F.gelu(x), -10, 10)


def _fast(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))


def _accurate(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3))))


def _quick(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _laplace(x: Tensor) -> Tensor:
    return 0.5 * (1.0 + torch.erf((x - 0.707107).div(0.282095 * math.sqrt(2.0))))


def _squared(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _root_of_softplus(x: Tensor) -> Tensor:
    return F.softplus(x).sqrt()


def _itself(x: Tensor) -> Tensor:
    return x


_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_10": _clipped,
    "gelu_fast": _fast,
    "gelu_accurate": _accurate,
    "quick_gelu": _quick,
    "laplace": _laplace,
    "relu2": _squared,
    "sqrtsoftplus": _root_of_softplus,
    "linear": _itself,
}
_MODULES: dict[str, Callable[[], nn.Module]] = {
    **dict.fromkeys(GELU_NEW, NewGELU),
    "gelu": nn.GELU,
    "gelu_python": nn.GELU,
    "hardswish": nn.Hardswish,
    "leaky_relu": nn.LeakyReLU,
    "mish": nn.Mish,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "swish": nn.SiLU,
    "tanh": nn.Tanh,
    "prelu": nn.PReLU,
    "xielu": XIELU,
    **{name: partial(Elementwise, name, function) for name, function in _FUNCTIONS.items()},
}


def activation(name: str) -> nn.Module:
    """A new module for a name that `config.ACTIVATIONS` lists."""
    return _MODULES[name]()
