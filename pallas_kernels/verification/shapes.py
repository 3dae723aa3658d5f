"""Layer shapes of real models: what kernels are compiled for, checked with and timed at."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """One decoder layer as one GPU holds it, and the format it is quantized in."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    group_size: int = 128
    num_outliers: int = 128
    kv_groups: int = 2
    qk_norm: bool = False

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """[N, K] of each linear; q/k/v and gate/up are one weight each."""
        attention = self.num_heads * self.head_dim
        return {
            "qkv_proj": (attention + 2 * self.num_kv_heads * self.head_dim, self.hidden_size),
            "o_proj": (self.hidden_size, attention),
            "gate_up_proj": (2 * self.intermediate_size, self.hidden_size),
            "down_proj": (self.hidden_size, self.intermediate_size),
        }


MODELS = {
    "SmolLM2-135M": LayerShape(576, 1536, 9, 3, 64, group_size=64, num_outliers=64),
    "Llama-2-7B": LayerShape(4096, 11008, 32, 32, 128),
    "Llama-3-8B": LayerShape(4096, 14336, 32, 8, 128),
    # One GPU of eight: heads, the MLP's width and the inputs of o_proj and down_proj are split.
    "Llama-3-70B/8": LayerShape(8192, 28672 // 8, 64 // 8, 8 // 8, 128),
    "Qwen3-8B": LayerShape(4096, 12288, 32, 8, 128, qk_norm=True),
}
# Not a model: shapes as narrow as the kernels can run, for checks that must be quick. It has three query
# heads a kv head, q/k norm and an odd number of tiles.
TINY = "tiny"
SHAPES = MODELS | {TINY: LayerShape(192, 320, 9, 3, 64, group_size=64, num_outliers=64, qk_norm=True)}
# Rows of a linear's input: tokens of one step of the engine.
DECODE_ROWS = (1, 16, 64, 128)
PREFILL_ROWS = (256, 4096)
