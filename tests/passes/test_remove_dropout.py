"""remove_dropout: only where dropping does nothing."""

import pytest
import torch
import torch.nn.functional as F

from sparsedm_compile.passes.remove_dropout import remove_dropout


@pytest.mark.parametrize(
    "call",
    [
        lambda x: F.dropout(x, 0.5, False),
        lambda x: F.dropout(x, p=0.3, training=False),
        lambda x: F.dropout(x, 0.0),
        lambda x: F.dropout(input=x, p=0.0, training=True),
        torch.nn.Dropout(0.5).eval(),
    ],
)
def test_an_identity_goes(lower, targets, call):
    x = torch.randn(3, 4)
    lowering, output = lower(lambda x: call(x) + 1, [x], [remove_dropout])
    assert "dropout" not in targets(lowering)
    assert torch.equal(output, x + 1)


@pytest.mark.parametrize("call", [lambda x: F.dropout(x), lambda x: F.dropout(x, 0.5, True), torch.nn.Dropout(0.5)])
def test_a_real_dropout_stays(lower, targets, call):
    lowering, _ = lower(lambda x: call(x) + 1, [torch.randn(3, 4)], [remove_dropout])
    assert "dropout" in targets(lowering)
