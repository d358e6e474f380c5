"""What is wrong with the way a judge is named is said in a line, before anything is loaded."""

import pytest

import yojo


@pytest.mark.parametrize("name", ["length", "some-folder"])
@pytest.mark.parametrize(
    "device, message", [("foo", "device='foo' is no device"), ("cuda:99", "there is no device cuda:99")]
)
def test_a_device_that_is_not_there(name, device, message):
    with pytest.raises(ValueError, match=message):
        yojo.judges.load_judge(name, device=device)
