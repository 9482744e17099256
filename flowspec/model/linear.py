"""Linear layers: the name of a quantization decides how weights are stored and multiplied.

A `Linear` has the shape of the layer and leaves the rest to its method. A quantization chooses a
method for each layer by the layer's name, since some formats mix several in one model. The method
takes the checkpoint's own tensors when the layer is filled, and converts them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LM_HEAD_NAME = "lm_head"


class LinearMethod(Protocol):
    """Stores and multiplies the weight of a linear layer. It keeps no state of a layer."""

    def create_weights(self, layer: "Linear", *, bias: bool) -> None:
        """Register the parameters and buffers of `layer`, on the device of the current context."""

    def checkpoint_shapes(self, layer: "Linear") -> Mapping[str, tuple[int, ...]]:
        """Return the shapes of the tensors that `load_weights` takes, by name below the layer's."""

    def load_weights(self, layer: "Linear", tensors: Mapping[str, Tensor]) -> None:
        """Fill `layer` from the tensors named by `checkpoint_shapes`, on their device."""

    def apply(self, layer: "Linear", x: Tensor) -> Tensor:
        """Map x [..., in] to [..., out] in the dtype of x, with the bias if there is one."""


class Linear(nn.Linear):
    """A linear layer in -> out whose method stores and multiplies the weight."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        method: LinearMethod | None = None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's would make a plain weight
        self.in_features, self.out_features = in_features, out_features
        self.has_bias = bias
        self.method = PLAIN if method is None else method
        self.method.create_weights(self, bias=bias)

    def use(self, method: LinearMethod) -> None:
        """Store and multiply by another method; weights must be loaded after that."""
        if method is self.method:
            return
        for name in [*self._parameters, *self._buffers]:
            delattr(self, name)
        self.method = method
        method.create_weights(self, bias=self.has_bias)

    def reset_parameters(self) -> None:
        """Make random weights, except on the meta device: torch imports 70 MB of compiler there."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., in] to [..., out]."""
        return self.method.apply(self, x)


class PlainLinear:
    """Keeps the weight as in the checkpoint: [out, in] in the model's dtype."""

    def create_weights(self, layer: Linear, *, bias: bool) -> None:
        """Make random weights as nn.Linear does."""
        layer.weight = nn.Parameter(torch.empty(layer.out_features, layer.in_features))
        if bias:
            layer.bias = nn.Parameter(torch.empty(layer.out_features))
        else:
            layer.register_parameter("bias", None)
        layer.reset_parameters()

    def checkpoint_shapes(self, layer: Linear) -> Mapping[str, tuple[int, ...]]:
        """Return the shapes of `weight` [out, in], and of `bias` [out] if there is one."""
        shapes: dict[str, tuple[int, ...]] = {"weight": (layer.out_features, layer.in_features)}
        if layer.has_bias:
            shapes["bias"] = (layer.out_features,)
        return shapes

    def load_weights(self, layer: Linear, tensors: Mapping[str, Tensor]) -> None:
        """Take the tensors as they are."""
        layer.load_state_dict(dict(tensors), assign=True)

    def apply(self, layer: Linear, x: Tensor) -> Tensor:
        """Compute one matrix product in the weight's dtype."""
        return F.linear(x, layer.weight, layer.bias)


PLAIN: LinearMethod = PlainLinear()


@dataclass(frozen=True, slots=True)
class Quantization:
    """Chooses the method of each linear layer of a model.

    `method_of` gets the layer's name in the checkpoint, such as `model.layers.3.mlp.up_proj`.
    """

    method_of: Callable[[str], LinearMethod]
    about: str


NONE = Quantization(lambda name: PLAIN, "weights in the model's dtype")
# A new quantization takes a file with its method and a row here.
QUANTIZATIONS: dict[str, Quantization] = {"none": NONE}


def find_quantization(name: str) -> Quantization:
    """Return a row of the table. Raises ValueError listing the known names."""
    if name not in QUANTIZATIONS:
        raise ValueError(f"unknown quantization {name!a}; known: {', '.join(QUANTIZATIONS)}")
    return QUANTIZATIONS[name]


def quantize(net: nn.Module, quantization: Quantization, *, tied_head: bool) -> None:
    """Give every Linear of `net` the method that `quantization` chooses; weights come later.

    A head that is tied to the embedding stays plain, since single rows of the embedding are read.
    """
    for name, layer in net.named_modules():
        if isinstance(layer, Linear) and not (tied_head and name == LM_HEAD_NAME):
            layer.use(quantization.method_of(name))


def checkpoint_shapes(net: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor that `load_weights` needs, by name; tied ones come once."""
    shapes = {name: tuple(value.shape) for name, value in net.named_parameters()}
    for prefix, layer in _converted(net).items():
        for name in [name for name in shapes if name.startswith(f"{prefix}.")]:
            del shapes[name]
        for name, shape in layer.method.checkpoint_shapes(layer).items():
            shapes[f"{prefix}.{name}"] = shape
    return shapes


def load_weights(net: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Fill `net`, for inference, from the tensors that `checkpoint_shapes` names.

    A plain parameter becomes the tensor itself; the other layers convert theirs.
    """
    plain = dict(tensors)
    for prefix, layer in _converted(net).items():
        names = layer.method.checkpoint_shapes(layer)
        layer.method.load_weights(layer, {name: plain.pop(f"{prefix}.{name}") for name in names})
    # Not strict: of two tied names only one is given, and converted layers have their own.
    net.load_state_dict(plain, strict=False, assign=True)
    net.requires_grad_(False)


def _converted(net: nn.Module) -> dict[str, Linear]:
    """Return the layers whose method converts the checkpoint's tensors, by name."""
    return {
        name: layer
        for name, layer in net.named_modules()
        if isinstance(layer, Linear) and not isinstance(layer.method, PlainLinear)
    }
