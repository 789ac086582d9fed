"""BLIP's attention by torch's fused kernel, on the weights of transformers' modules, which compute it step by step.

The numbers are the same to rounding. No matrix of attention weights is kept, and the tokens of an image that several
prompts ask about are projected once.
"""

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BlipTextModel, BlipVisionModel
from transformers.models.blip.modeling_blip import BlipAttention, BlipEncoderLayer
from transformers.models.blip.modeling_blip_text import BlipTextAttention, BlipTextSelfAttention


def fuse(vision: BlipVisionModel, text: BlipTextModel) -> None:
    """Replaces the attention of both towers, in place; names and values of their parameters stay."""
    for module in [*vision.modules(), *text.modules()]:
        if isinstance(module, BlipEncoderLayer):
            module.add_module("self_attn", VisionAttention(module.self_attn))
        elif isinstance(module, BlipTextAttention):
            module.add_module("self", TextAttention(module.self))


class VisionAttention(nn.Module):
    """What `BlipAttention` computes."""

    def __init__(self, stock: BlipAttention) -> None:
        super().__init__()
        self.qkv, self.projection = stock.qkv, stock.projection
        self.dropout, self._heads = stock.dropout, stock.num_heads

    def forward(
        self, hidden_states: Float[Tensor, "batch tokens width"], **_: object
    ) -> tuple[Float[Tensor, "batch tokens width"], None]:
        """Attention among an image's tokens; other arguments ask for outputs that VP-Score never does."""
        queries, keys, values = rearrange(
            self.qkv(hidden_states), "b n (three heads width) -> three b heads n width", three=3, heads=self._heads
        )
        dropout = self.dropout.p if self.training else 0.0
        seen = F.scaled_dot_product_attention(queries, keys, values, dropout_p=dropout)
        return self.projection(rearrange(seen, "b heads n width -> b n (heads width)")), None


class TextAttention(nn.Module):
    """What `BlipTextSelfAttention` computes, except that images may be fewer than prompts.

    Then each image belongs to as many consecutive prompts: its tokens become keys and values once, and the prompts'
    queries stand in one long row before them, as queries do not see each other.
    """

    def __init__(self, stock: BlipTextSelfAttention) -> None:
        super().__init__()
        self.query, self.key, self.value, self.dropout = stock.query, stock.key, stock.value, stock.dropout
        self._heads = stock.num_attention_heads

    def forward(
        self,
        hidden_states: Float[Tensor, "batch length width"],
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Float[Tensor, "images tokens image_width"] | None = None,
        **_: object,
    ) -> tuple[Float[Tensor, "batch length width"], None]:
        """Attention to the prompt itself, or to the images if they are given; a mask is added to the former's logits.

        The remaining arguments are transformers' cache, whose name changes with its version and which is never used.
        """
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        each = len(hidden_states) // len(source)
        queries = rearrange(
            self.query(hidden_states),
            "(b each) n (heads width) -> b heads (each n) width",
            each=each,
            heads=self._heads,
        )
        keys, values = (
            rearrange(layer(source), "b n (heads width) -> b heads n width", heads=self._heads)
            for layer in (self.key, self.value)
        )
        mask = attention_mask if encoder_hidden_states is None else None
        dropout = self.dropout.p if self.training else 0.0
        seen = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, dropout_p=dropout)
        return rearrange(seen, "b heads (each n) width -> (b each) n (heads width)", each=each), None
