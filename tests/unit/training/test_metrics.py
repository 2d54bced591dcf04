import pytest

from megatron_anyexperts.training.metrics import loss_layers


@pytest.mark.parametrize(
    "pattern, repeated, layers",
    [
        ("*E*E", False, 2),
        ("*-*E|*E", False, 2),
        ("*E*E/*E", False, 3),
        ("*E*E/*E/*E", False, 4),
        ("*E*E/*E/*E", True, 3),
    ],
)
def test_a_router_loss_is_averaged_over_the_layers_that_record_it(pattern, repeated, layers):
    assert loss_layers(pattern, repeated) == layers
