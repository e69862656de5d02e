"""Where training begins: the drafter's layers are the target's last ones, so that the first gradient already means something.

layers.i      target layer N - L + i, its input norm folded into q, k and v, since the context meets k and v without it; its q
              and k norms start at the root-mean-square that the target's own heads have
fc            identity on the last captured layer; hidden_norm 1
norm          the target's final norm
markov w1     the leading principal components of the embedding, so that unseen ids too have sensible rows; w2 zero
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dspark.training.draft_network import DraftNetwork

_COPIED = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
    "post_attention_layernorm",
)


def warm_start(network: DraftNetwork, target: Mapping[str, Tensor], states: Tensor) -> None:
    """`target`: the target's weights by Hugging Face's names. states: [n, d], some outputs of the last captured layer."""
    spec = network.spec
    random_start(network)
    own = dict(network.named_parameters())
    first = spec.num_target_layers - spec.num_layers
    with torch.no_grad():
        for index in range(spec.num_layers):
            to, source = f"layers.{index}.", f"model.layers.{first + index}."
            for name in _COPIED:
                own[f"{to}{name}.weight"].copy_(target[f"{source}{name}.weight"])
            for letter in "qkv":
                own[f"{to}self_attn.{letter}_proj.weight"].mul_(target[f"{source}input_layernorm.weight"])
            normed = F.rms_norm(states.float(), (spec.hidden_size,), eps=spec.rms_norm_eps)
            for letter in "qk":
                name = f"self_attn.{letter}_norm.weight"
                heads = (normed @ own[f"{to}self_attn.{letter}_proj.weight"].T).view(len(normed), -1, spec.head_dim)
                own[f"{to}{name}"].copy_(target.get(f"{source}{name}", heads.pow(2).mean((0, 1)).sqrt()))
        own["fc.weight"].zero_()
        own["fc.weight"][:, -spec.hidden_size :] = torch.eye(spec.hidden_size)
        own["norm.weight"].copy_(target["model.norm.weight"])
        if spec.markov:
            embedding = target["model.embed_tokens.weight"].float()
            _, _, directions = torch.pca_lowrank(embedding, q=spec.markov_rank, niter=4)
            components = (embedding - embedding.mean(0)) @ directions
            own["markov_head.markov_w1.weight"].copy_(components / components.std())
            own["markov_head.markov_w2.weight"].zero_()


def random_start(network: nn.Module) -> None:
    """DeepSpec's: weights N(0, 0.02), biases 0, norms 1."""
    for module in network.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, 0.0, 0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
