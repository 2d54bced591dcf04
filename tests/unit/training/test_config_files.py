import pytest

from megatron_anyexperts.config_search import shipped_folder
from megatron_anyexperts.training.config_files import read_config
from megatron_anyexperts.training.usage import UsageError


@pytest.fixture
def write(tmp_path):
    def file(name: str, text: str) -> str:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return str(path)

    return file


def test_a_configuration_is_an_edit_of_its_base(write):
    write("large.yaml", "hidden-size: 64\nlr: 1.0\nbf16: true\n")
    write("sizes/middle.yaml", "base: ../large.yaml\nhidden_size: 32\n")
    small = write("small.yaml", "base: sizes/middle.yaml\nlr: 2.0\nbf16: false\n")
    assert read_config(small) == {"hidden-size": 32, "lr": 2.0, "bf16": False}


def test_shipped_configurations_are_found_by_name(write):
    assert read_config("demo") == read_config(str(shipped_folder() / "demo.yaml"))
    assert read_config(write("own.yaml", "base: demo\nlr: 9.0")) == read_config("demo") | {"lr": 9.0}


def test_a_file_of_the_same_name_wins(write, tmp_path, monkeypatch):
    write("demo", "lr: 9.0")
    monkeypatch.chdir(tmp_path)
    assert read_config("demo") == {"lr": 9.0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: 1.0e-4\nlr: 1.0e-3", "'lr' is there twice"),
        ("base: nowhere", "cannot find the configuration nowhere: .*shipped.*demo"),
        ("base: [a, b]", r"base is \['a', 'b'\]"),
        ("base: one.yaml", "one.yaml is its own base"),
        ("base: two.yaml", "one.yaml is its own base"),
    ],
)
def test_a_base_that_cannot_be_is_refused(write, text, message):
    one = write("one.yaml", text)
    write("two.yaml", "base: one.yaml")
    with pytest.raises(UsageError, match=message):
        read_config(one)
