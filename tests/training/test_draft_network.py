"""What is trained is what runs: the network's logits are the formulae's, for many blocks of several sequences at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from draft_checkpoints import draft_config, random_tensors, write_draft_checkpoint
from naive_dspark import NaiveDSpark

from dspark.engine.drafters.draft_checkpoint import EMBEDDING, HEAD, read_draft_spec
from dspark.training.draft_network import DraftNetwork


@pytest.mark.parametrize("markov", ["vanilla", "gated", "rnn", None])
def test_teacher_forced_logits_and_confidence_equal_the_formulae(tmp_path: Path, markov: str | None) -> None:
    config = draft_config(markov=markov, confidence=markov is not None)
    tensors = random_tensors(config)
    write_draft_checkpoint(tmp_path, config, tensors)
    spec = read_draft_spec(tmp_path)
    network = DraftNetwork(spec, tensors[EMBEDDING].float(), max_len=64)
    own = {name: tensor.float() for name, tensor in tensors.items() if name not in (EMBEDDING, HEAD)}
    network.load_state_dict(own)
    naive = NaiveDSpark(config, tensors)

    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(spec.vocab_size - 1, (2, 20), generator=generator)
    features = torch.randn(2, 20, len(spec.target_layer_ids) * spec.hidden_size, generator=generator)
    anchors = torch.tensor([[3, 9, 17], [1, 12, 12]])
    with torch.no_grad():
        hidden = network.backbone(features, tokens, anchors)
        for s in range(2):
            for a in range(3):
                position = int(anchors[s, a])
                wanted = naive.draft(tokens[s, : position + 1].tolist(), features[s])
                previous = torch.tensor([int(tokens[s, position]), *wanted.tokens[:-1]])
                logits = network.logits(hidden[s, a], previous, tensors[HEAD].float())
                torch.testing.assert_close(logits, wanted.logits, atol=1e-4, rtol=1e-4)
                if spec.confidence_head:
                    found = network.confidence(hidden[s, a], previous)
                    torch.testing.assert_close(found, wanted.confidence, atol=1e-4, rtol=1e-4)
