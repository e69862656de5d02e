"""Where an Eagle3 drafter begins: its layer is the target's last one, as far as the shapes allow.

q, k, v     half for the state: the target's; half for the embedding: N(0, 0.02)
hidden_norm the target's input norm; input_layernorm 1; q and k norm the root-mean-square that the target's own heads have
fc          identity on the last captured layer
norm        the target's final norm
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dspark.training.eagle3_network import Eagle3Network
from dspark.training.warm_start import random_start

_COPIED = ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "post_attention_layernorm")


def eagle3_warm_start(network: Eagle3Network, target: Mapping[str, Tensor], states: Tensor) -> None:
    """`target`: the target's weights by Hugging Face's names. states: [n, d], some outputs of the last captured layer."""
    spec = network.spec
    assert spec.num_target_layers is not None, "a drafter in training knows its target"
    random_start(network)
    own = dict(network.named_parameters())
    to, source, d = "layers.0.", f"model.layers.{spec.num_target_layers - 1}.", spec.hidden_size
    with torch.no_grad():
        for name in _COPIED:
            own[f"{to}{name}.weight"].copy_(target[f"{source}{name}.weight"])
        for letter in "qkv":
            name = f"self_attn.{letter}_proj.weight"
            own[f"{to}{name}"][:, d:].copy_(target[f"{source}{name}"])
        own[f"{to}hidden_norm.weight"].copy_(target[f"{source}input_layernorm.weight"])
        normed = network.layer.hidden_norm(states.float())
        for letter in "qk":
            name = f"self_attn.{letter}_norm.weight"
            heads = (normed @ own[f"{to}self_attn.{letter}_proj.weight"][:, d:].T).view(len(normed), -1, spec.head_dim)
            own[f"{to}{name}"].copy_(target.get(f"{source}{name}", heads.pow(2).mean((0, 1)).sqrt()))
        own["fc.weight"].zero_()
        own["fc.weight"][:, -d:] = torch.eye(d)
        own["norm.weight"].copy_(target["model.norm.weight"])
