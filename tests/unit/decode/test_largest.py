"""The best token of a row, found in vectors, is torch's."""

import pytest
import torch

from gemmakit.pytorch.decode.sampling import LINE, NO_TOKEN, greedy, largest

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("V", [1, LINE - 1, LINE, LINE + 1, 3 * LINE - 5, 4 * LINE])
@pytest.mark.parametrize("values", [(0.0,), (-INF,), (0.0, 1.0), (-INF, INF), (0.0, 1.0, NAN), (-2.0, -1.0, -INF)])
def test_the_first_largest_of_a_row_wherever_it_stands(V, values):
    for _ in range(20):
        scores = torch.full((3, V), -INF)
        count = int(torch.randint(1, 5, ()))
        at = torch.randint(V, (3, count))
        scores.scatter_(1, at, torch.tensor(values)[torch.randint(len(values), (3, count))])
        best, place = largest(scores)
        torch.testing.assert_close(best, scores.max(-1).values, equal_nan=True, rtol=0, atol=0)
        first = torch.where(best.isnan()[:, None], scores.isnan(), scores == best[:, None]).int().argmax(-1)
        assert torch.equal(place, first)
        assert torch.equal(greedy(scores), torch.where(best.isfinite(), first, NO_TOKEN))


def test_lines_of_a_strided_row():
    scores = torch.randn(2, 5 * LINE + 3, 2)[..., 0]
    assert torch.equal(largest(scores)[1], scores.argmax(-1))
