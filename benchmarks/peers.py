"""Other libraries' layers for ``bench_gpu.py``; none of their code is here.

Install beside this package what should be compared:

    pip install --no-deps sonic-moe==0.1.2.post1 quack-kernels==0.3.11 nvidia-cutlass-dsl==4.4.2 \\
        nvidia-cutlass-dsl-libs-base==4.4.2 apache-tvm-ffi torch-c-dlpack-ext
    pip install --no-deps liger-kernel==0.8.5
    git clone https://github.com/shawntan/scattermoe && pip install --no-deps ./scattermoe

Each ``make`` returns the layer as a module from tokens ``(T, D)`` to tokens; it raises
``ImportError`` where its library is missing. Those without a router get a linear one in bfloat16,
softmax in float32, top-k.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from layer_gpu import BF16, Shape  # beside this file
from torch import Tensor, nn


class SonicLayer(nn.Module):
    """SonicMoE's own module, without the balance loss that it returns beside the output."""

    def __init__(self, shape: Shape, *, tune: bool) -> None:
        super().__init__()
        sonic: Any = import_module("sonicmoe")
        if not tune:
            pin_sonic()
        sizes = (shape.E, shape.K, shape.D, shape.F)
        gated = import_module("sonicmoe.enums").ActivationType.SWIGLU
        self.layer = sonic.MoE(*sizes, gated, False, 0.02).to("cuda", BF16)

    def forward(self, x_TD: Tensor) -> Tensor:
        y_TD: Tensor = self.layer(x_TD, is_inference_mode=not torch.is_grad_enabled())[0]
        return y_TD


def pin_sonic() -> None:
    """Its tuner compiles dozens of kernels, minutes for a shape: take the tile it chose most."""
    gemm = import_module("quack.gemm_interface")
    tuned_config = import_module("quack.autotuner").AutotuneConfig
    tile = import_module("quack.gemm_config").GemmConfig(
        tile_m=128,
        tile_n=256,
        pingpong=False,
        is_dynamic_persistent=False,
        cluster_m=2,
        cluster_n=1,
    )
    for name in dir(gemm):
        tuned = getattr(gemm, name)
        if hasattr(tuned, "configs") and hasattr(tuned, "fn"):
            tuned.configs = [tuned_config(config=tile)]


class RoutedLayer(nn.Module):
    """A linear router before somebody's experts, which take x, ids and weights."""

    def __init__(self, shape: Shape, experts: Callable[..., Tensor], weights: list[Tensor]) -> None:
        super().__init__()
        self.k = shape.K
        self.gate = nn.Linear(shape.D, shape.E, bias=False, device="cuda", dtype=BF16)
        self.run = experts
        self.weights = nn.ParameterList(nn.Parameter(w) for w in weights)

    def forward(self, x_TD: Tensor) -> Tensor:
        score_TK, expert_TK = self.gate(x_TD).float().softmax(-1).topk(self.k)
        return self.run(x_TD, expert_TK, score_TK.to(BF16), *self.weights)


def scatter_layer(shape: Shape, *, tune: bool) -> nn.Module:
    """ScatterMoE's gated experts."""
    experts = (
        import_module("scattermoe.mlp").GLUMLP(shape.D, shape.F, shape.E, shape.K).to("cuda", BF16)
    )
    layer = RoutedLayer(shape, lambda x, ids, scores: experts(x, scores, ids), [])
    layer.add_module("experts", experts)
    return layer


def liger_layer(shape: Shape, *, tune: bool) -> nn.Module:
    """Liger-Kernel's fused experts; without its tuner it takes one fixed tile."""
    function = import_module("liger_kernel.ops.fused_moe").LigerFusedMoEFunction

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, device="cuda", dtype=BF16) * sizes[-1] ** -0.5

    def run(x: Tensor, ids: Tensor, scores: Tensor, up: Tensor, down: Tensor) -> Tensor:
        y: Tensor = function.apply(x, up, down, ids.int(), scores)
        return y

    up, down = normal(shape.E, 2 * shape.F, shape.D), normal(shape.E, shape.D, shape.F)
    return RoutedLayer(shape, run, [up, down])


PEERS: dict[str, Any] = {
    "SonicMoE": SonicLayer,
    "ScatterMoE": scatter_layer,
    "Liger-Kernel": liger_layer,
}
