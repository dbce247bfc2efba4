"""Which heads a text, a file or a range means, and what is said of those that are none."""

import pytest

from tl_headnorm.errors import InputError
from tl_headnorm.interventions import heads


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.3", ((0, 3),)),
        ("2.1-3, 0.0", ((0, 0), (2, 1), (2, 2), (2, 3))),
        ("1.*", tuple((1, h) for h in range(4))),
    ],
)
def test_heads_as_text(text, expected):
    assert heads.parse_heads(text, 3, 4) == expected


@pytest.mark.parametrize("name", ["heads.json", "heads.yaml"])
def test_heads_from_a_file(tmp_path, name):
    path = tmp_path / name
    path.write_text('{"0": [1, 3], "2": [0]}')
    found = heads.parse_heads(str(path), 3, 4)
    assert found == ((0, 1), (0, 3), (2, 0))
    assert heads.as_file(found) == {"0": [1, 3], "2": [0]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("3.0", "expected layers from 0 to 2 and heads from 0 to 3, found 3.0"),
        ("0.4", "expected heads from 0 to 3, found '0.4'"),
        ("0.2-1", "expected a range in ascending order, found '0.2-1'"),
        ("most", "expected L.H, L.H-H, L.*, a file, all, sweep, none, top:K or bottom:K, found"),
        ("gone.json", "expected a file with 'layer: [heads]', found gone.json"),
    ],
)
def test_heads_that_are_none(text, message):
    with pytest.raises(InputError, match="heads: ") as error:
        heads.parse_heads(text, 3, 4)
    assert message in str(error.value)


def test_layers_as_text():
    assert heads.parse_layers("0,2-3", 4) == (0, 2, 3)
    assert heads.parse_layers("all", 2) == (0, 1)
    with pytest.raises(InputError, match="expected layers from 0 to 3, found '2-4'"):
        heads.parse_layers("2-4", 4)
