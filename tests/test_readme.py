"""The examples of the README run as they stand."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.S)


def test_there_is_an_example_for_each_user():
    assert len(EXAMPLES) == 5


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(EXAMPLES[number], f"README example {number + 1}", "exec"), names)
    if "model" in names:
        assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert names["loss" if "loss" in names else "y"].isfinite().all()
