"""The online softmax on logits given outright; through an output layer and with gradients it is in test_projection."""

import torch

from learner.online_softmax import Chunk, Shaping, SoftmaxState, fold_chunk


def test_every_position_has_a_peak_of_its_own() -> None:
    """Relative to the largest logit of all positions, those of the second would vanish."""
    logits_SV = torch.tensor([[1e4, 0.0, 3.0], [0.5, 1.0, 2.0]])
    target_S = torch.tensor([0, 2])
    state = SoftmaxState.before(torch.zeros(2, 1))
    for start, stop in ((0, 2), (2, 3)):
        fold_chunk(state, Chunk(logits_SV[:, start:stop], target_S - start), Shaping(1.0, None))
    logprobs_S, entropy_S, log_sum_S = state.results()
    log_p_SV = logits_SV.double().log_softmax(dim=1)
    torch.testing.assert_close(logprobs_S.double(), log_p_SV[[0, 1], target_S], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(entropy_S.double(), -(log_p_SV.exp() * log_p_SV).sum(dim=1), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(log_sum_S.double(), logits_SV.double().logsumexp(dim=1), rtol=1e-6, atol=1e-7)
