"""TopK language models for transformers: Llama whose chosen blocks keep their k largest values.

Needs torch and transformers alone. A copy of this file lies in every exported folder, where
`AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)` finds it.

Of a row x, T being its k-th largest value and f the activation (arXiv 2506.21468):

    y_i = f(x_i) where x_i >= T, else 0

(and topk_alpha * f(x_i) in place of 0 for a model from inside the annealing phase of training).
Ties at T are kept, a row with a NaN is NaN throughout, k >= D gives f(x), and T is a constant
to the gradient. `hidden_states[i + 1]` of a model's output is what block i returned, which for
`topk_site: residual` are the latents; the last entry is after the final norm, as in every
Llama.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaMLP,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRotaryEmbedding,
)

SITES = ("residual", "mlp")
# f(0) = 0 and f(NaN) = NaN for each of them: see topk().
ACTIVATIONS = {"relu": F.relu, "identity": lambda x: x, "gelu": F.gelu, "silu": F.silu}


class TopKLMConfig(LlamaConfig):
    """Llama's fields and, of TopK:

    topk_k: values of a row that survive, at least 1.
    topk_layers: indices of the blocks that have TopK.
    topk_site: "residual", at the end of the block; "mlp", in place of the feed-forward's SiLU.
    topk_activation: "relu", "identity", "gelu" or "silu".
    topk_alpha: annealing coefficient in [0, 1]; 0 is the hard form.

    ValueError for a value that is not allowed.
    """

    model_type = "topk_lm"

    topk_k: int = 64
    topk_layers: list[int] | None = None
    topk_site: str = "residual"
    topk_activation: str = "relu"
    topk_alpha: float = 0.0

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.topk_layers = sorted(self.topk_layers or [])
        if self.topk_k < 1:
            raise ValueError(f"topk_k={self.topk_k} is too small: give at least 1")
        if not 0 <= self.topk_alpha <= 1:
            raise ValueError(f"topk_alpha={self.topk_alpha} is out of range: give 0 to 1")
        if self.topk_site not in SITES:
            raise ValueError(f"topk_site={self.topk_site!r} is not known: choose {SITES}")
        if self.topk_activation not in ACTIVATIONS:
            raise ValueError(
                f"topk_activation={self.topk_activation!r} is not known: choose one of"
                f" {', '.join(ACTIVATIONS)}"
            )
        if any(not 0 <= i < self.num_hidden_layers for i in self.topk_layers):
            raise ValueError(
                f"topk_layers={self.topk_layers} names a block that a model of"
                f" {self.num_hidden_layers} does not have: give indices from 0"
            )


def topk(x: Tensor, k: int, activation: str, alpha: float = 0.0) -> Tensor:
    """TopK over the last dimension: x and the result are [..., D], one floating dtype."""
    f = ACTIVATIONS[activation]
    if k >= x.shape[-1] or alpha == 1:
        return f(x)
    with torch.no_grad():
        largest = torch.topk(x, k, dim=-1).values  # [..., k], falling, NaN first
        has_nan = largest[..., :1].isnan()  # [..., 1]
        kept = x >= torch.where(has_nan, torch.nan, largest[..., -1:])  # [..., D]
        poison = torch.where(has_nan, torch.nan, 0.0).to(x.dtype)
    if alpha != 0:
        f_x = f(x)
        return torch.where(kept, f_x, alpha * f_x + poison)
    # x is masked and not f(x): the slope of silu at -inf is NaN, and where() would multiply it
    # by the zero gradient of what is dropped.
    return f(torch.where(kept, x, poison))


class TopKLMTopK(nn.Module):
    """`topk` with its settings. No parameters, no buffers."""

    def __init__(self, config: TopKLMConfig):
        super().__init__()
        self.k = config.topk_k
        self.activation = config.topk_activation
        self.alpha = config.topk_alpha

    def forward(
        self, h: Tensor, update: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """TopK of h, or of h + update: [..., D]. The result is of `dtype` if given.

        Of half precision the sum is taken, and selected on, in float32, as in training: rounded,
        sums would tie, and ties are all kept.
        """
        if update is not None:
            dtype = dtype or torch.promote_types(h.dtype, update.dtype)
            wide = torch.promote_types(dtype, torch.float32)
            h = h.to(wide) + update.to(wide)
        return topk(h, self.k, self.activation, self.alpha).to(dtype or h.dtype)

    def extra_repr(self) -> str:
        return f"k={self.k}, activation={self.activation}, alpha={self.alpha}"


class TopKLMRMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight in float32 or better; Llama's cuts float64 to float32."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        wide = x.to(dtype)
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return (wide * self.weight.to(dtype)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


class TopKLMDecoderLayer(LlamaDecoderLayer):
    """Llama's block, with TopK where the config puts it."""

    def __init__(self, config: TopKLMConfig, layer_idx: int):
        # Llama's own constructor would make its norms first, for nothing.
        super(LlamaDecoderLayer, self).__init__()
        self.hidden_size = config.hidden_size
        self.self_attn = LlamaAttention(config=config, layer_idx=layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = TopKLMRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = TopKLMRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.topk = None
        if layer_idx in config.topk_layers:
            if config.topk_site == "residual":
                self.topk = TopKLMTopK(config)
            else:
                self.mlp.act_fn = TopKLMTopK(config)

    def forward(self, hidden_states: Tensor, **kwargs) -> Tensor:
        """hidden_states and the result: [B, S, D]; the rest by name, as Llama's model passes it."""
        if self.topk is None:
            return super().forward(hidden_states, **kwargs)
        # Llama's own block would add the last part before TopK sees it.
        attended = self.self_attn(self.input_layernorm(hidden_states), **kwargs)[0]
        hidden_states = hidden_states + attended
        return self.topk(hidden_states, self.mlp(self.post_attention_layernorm(hidden_states)))


class TopKLMPreTrainedModel(LlamaPreTrainedModel):
    config_class = TopKLMConfig
    config: TopKLMConfig
    _no_split_modules = ["TopKLMDecoderLayer"]  # noqa: RUF012 (transformers' own form)
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": TopKLMDecoderLayer,
        "attentions": LlamaAttention,
    }


class TopKLMModel(TopKLMPreTrainedModel, LlamaModel):
    """Token ids to hidden states; the forward is Llama's."""

    def __init__(self, config: TopKLMConfig):
        super(LlamaModel, self).__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            TopKLMDecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = TopKLMRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


class TopKLMForCausalLM(TopKLMPreTrainedModel, LlamaForCausalLM):
    """Token ids to logits, loss and generations; the forward is Llama's."""

    def __init__(self, config: TopKLMConfig):
        super(LlamaForCausalLM, self).__init__(config)
        self.model = TopKLMModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


__all__ = ["TopKLMConfig", "TopKLMForCausalLM", "TopKLMModel", "TopKLMPreTrainedModel"]
