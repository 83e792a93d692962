"""A network of the user's is converted as an export would, before a search."""

from pathlib import Path

import pytest

from hpsearch.bundle.formats import check_conversion
from hpsearch.config.definition import parse_definition
from hpsearch.errors import OwnCodeError
from hpsearch.training.networks import OwnNetwork, build_network

SOURCE = """\
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self, n_pixels, n_classes, width):
        super().__init__()
        self.first, self.head = nn.Linear(n_pixels, width), nn.Linear(width, n_classes)

    def forward(self, images):
        values = torch.relu(self.first(images.flatten(1)))
        {}

def build(image_shape, n_classes, *, width: int):
    return Net(image_shape[0] * image_shape[1] * image_shape[2], n_classes, width)
"""


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        ("return self.head(values.reshape(images.shape[0], -1))", ""),
        ("return self.head(values.view(len(images), -1))", "depends on the number of images; instead of len(images)"),
        ("return self.head(values) if values.mean() > 0 else values", "nets.py:10: GuardOnDataDependentSymNode"),
        ("return self.head(values if len(images) > 5 else values * 2)", "depends on the number of images"),
        ("return self.head(values).sort(1).values + self.head(values)[torch.arange(images.shape[0])]", ""),
        ("return self.head(values.to_sparse().to_dense())", "nets.py:10: UnsupportedOperatorException"),
        ("return self.head(torch.from_numpy(values.detach().numpy())) + self.head(values)", "nets.py:10: "),
    ],
)
def test_a_network_that_cannot_be_exported_is_named_by_check(
    tmp_path: Path, forward: str, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "nets.py").write_text(SOURCE.format(forward))
    tables = {"network": {"kind": "nets.py:build"}, "search": {"width": {"int": [16, 32]}}}
    definition = parse_definition(tables, folder=tmp_path)
    code = definition.network.code
    network = build_network(definition.network, definition.space.hyperparameters(width=16), (1, 2, 2), 3)  # type: ignore[call-arg]
    assert code
    assert isinstance(network, OwnNetwork)
    if not message:
        return check_conversion(code, network, (1, 2, 2), 3)
    with pytest.raises(OwnCodeError, match=r"torch.export cannot convert it") as caught:
        check_conversion(code, network, (1, 2, 2), 3)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert capfd.readouterr().err == ""
    return None
