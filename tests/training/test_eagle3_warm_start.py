"""Without the embedding's share, a warm-started Eagle3 drafter is the target's last layer."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model

from dspark.engine.drafters.eagle3_checkpoint import Eagle3Spec
from dspark.engine.models.spec import RopeSpec
from dspark.training.eagle3_network import Eagle3Network
from dspark.training.eagle3_warm_start import eagle3_warm_start

LENGTH = 14


@pytest.mark.parametrize(("architecture", "tolerance"), [("Qwen3ForCausalLM", 1e-4), ("LlamaForCausalLM", 0.045)])
def test_its_first_step_on_the_last_but_one_layers_output_gives_the_targets_final_state(
    architecture: str, tolerance: float
) -> None:
    """Exactly for a target with q and k norms; without them, norms of the same mean size stand in for no norm."""
    model = tiny_model(architecture, num_hidden_layers=3, head_dim=32)
    config = model.config
    spec = Eagle3Spec(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.rms_norm_eps,
        rope=RopeSpec("default", config.rope_parameters["rope_theta"]),
        attention_bias=False,
        ttt_length=2,
        target_layer_ids=(0, 1),
        num_target_layers=3,
    )
    tokens = torch.randint(config.vocab_size, (1, LENGTH + 3), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        states = model.model(tokens[:, :LENGTH], output_hidden_states=True).hidden_states
        network = Eagle3Network(spec, model.get_input_embeddings().weight, LENGTH)
        eagle3_warm_start(network, model.state_dict(), states[2][0])
        for name in ("q_proj", "k_proj", "v_proj"):
            network.layer.self_attn.get_submodule(name).weight[:, : spec.hidden_size] = 0.0
        anchors = torch.arange(1, LENGTH + 1)[None]
        first = network.backbone(torch.cat(states[1:3], dim=-1), tokens, anchors)[:, :, 0]
    error = (first - states[3]).norm() / states[3].norm()
    assert error < tolerance
