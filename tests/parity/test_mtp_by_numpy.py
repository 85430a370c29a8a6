"""Multi-token prediction, which no model class computes: against plain numpy, and transformers' drafting module."""

import kinds
import numpy as np
import plain
import pytest
from kinds import MTP, B, T

from dsjax.hub.load import load, logits


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Our model, its folder, the numpy one, tokens with clear choices, and what numpy says of the MTP module."""
    tensors = kinds.draw(MTP)
    copies = {"embed_tokens": "model.embed_tokens", "shared_head.head": "lm_head"}  # as released
    tensors |= {f"model.layers.3.{copy}.weight": tensors[f"{name}.weight"] for copy, name in copies.items()}
    folder = kinds.write_folder(tmp_path_factory.mktemp("hub") / "mtp", MTP, tensors)
    referee = plain.Plain(MTP, tensors)
    return load(folder, dtype="float32"), folder, referee, *plain.clear_tokens(referee, (B, T), kinds.GAP)


def test_logits_of_the_trunk_are_those_of_plain_numpy(model):
    ours, _, referee, tokens, _ = model
    expected = np.stack([referee.logits(referee.trunk(row)) for row in tokens])
    worst = kinds.check_logits(logits(ours, tokens), expected)
    print(f"trunk against numpy: logits within {worst:.1e}")


def test_logits_of_multi_token_prediction_are_those_of_plain_numpy(model):
    ours, _, _, tokens, expected = model
    worst = kinds.check_logits(kinds.mtp_logits(ours, tokens)[:, :-1], expected)
    print(f"MTP against numpy: logits within {worst:.1e}")


def test_logits_of_multi_token_prediction_are_those_of_transformers(model):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers", minversion="5.23")
    import oracle
    from transformers.modeling_layers import MtpModel

    ours, folder, _, tokens, _ = model
    trunk = oracle.read(folder)
    trunk._keys_to_ignore_on_load_unexpected = [r"model\.layers\.3\..*"]  # MtpModel looks there for its layer: 61 of V3
    module, ids = MtpModel.from_pretrained(trunk).eval(), torch.from_numpy(tokens)
    with torch.no_grad():
        hidden = trunk.model(ids).last_hidden_state[:, :-1]
        out = module.forward_layer(0, hidden, torch.arange(T - 1)[None], None, input_ids=ids[:, 1:])
        expected = trunk.lm_head(out).numpy()
    worst = kinds.check_logits(kinds.mtp_logits(ours, tokens)[:, :-1], expected)
    print(f"MTP against transformers' MtpModel: logits within {worst:.1e}")
