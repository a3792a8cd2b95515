"""Models on hardware as cost models, for the simulated world. Numbers with their sources.

None of the GPU figures was measured by this project.
"""

from __future__ import annotations

from kunserve.policy.cost_model import CostModel
from kunserve.sim.pipeline import PipelineProfile

BLOCK_SIZE = 16

QWEN_14B_ON_A100 = CostModel(
    alpha_ns=5.5,
    delta_ns=136.0,
    beta_ns=114_600.0,
    gamma_ns=20e6,
    head_gamma_ns=0.99e6,
    head_ns=6_200.0,
    sharpness=1.68,
    head_sharpness=1.68,
)
"""Qwen2.5-14B, bf16, on one A100-80G: 48 layers of 275M parameters, 40 heads and 8 KV heads of 128.

From fits to published kernel timings: linear layers 250 TFLOP/s and 1.58 TB/s with exponent 1.68
(aiconfigurator 0.12, vidur), prefill attention 180 TFLOP/s, decode attention 1.45 TB/s, elementwise
1.2 TB/s, and 8 to 19 us for each kernel, which are in `gamma_ns`:

    alpha  48 x 4 x 128 x 40 FLOP / 180 TFLOP/s           per pair
    delta  48 x 4096 B / 1.45 TB/s                        per token of context
    beta   26.4 GFLOP / 250 TFLOP/s + 9 us elementwise and attention
    gamma  26.4 GB / 1.58 TB/s + 3.3 ms of kernel starts
    head   1.56 GB / 1.58 TB/s, and 1.56 GFLOP / 250 TFLOP/s for a row
"""

A100_KV_TOKENS = 590_000
"""Of two merged instances: 2 x 72 GB less one copy of 28 GB and 3 GB more, at 192 KiB a token."""

ACTIVATION_LINK_NS = 29_000.0
"""Start-up of a send between two servers with A100 (vidur)."""

ACTIVATION_LINK_NS_PER_ROW = 410.0
"""10 KiB over 200 Gb/s."""


def a100_pipeline(num_stages: int) -> PipelineProfile:
    """The 14B model on 2 or 4 merged servers, layers evenly divided."""
    return PipelineProfile(
        QWEN_14B_ON_A100,
        stage_layers=(48 // num_stages,) * num_stages,
        kv_blocks=A100_KV_TOKENS * num_stages // 2 // BLOCK_SIZE,
        link_ns=ACTIVATION_LINK_NS,
        link_ns_per_row=ACTIVATION_LINK_NS_PER_ROW,
    )
