"""A model's file that is not there: what loading says to do."""

from __future__ import annotations

import pytest

import runtime


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("none.gguf", "none.gguf: no such file; check the path"),
        ("Qwen/Qwen3-0.6B-GGUF", 'get the file with "hf download Qwen/Qwen3-0.6B-GGUF --local'),
        ("hf.co/org/name:Q8_0", "hf download org/name --include '*Q8_0*.gguf'"),
        ("llama3.2:1b", "llama3.2:1b is a name of Ollama's, and models are not downloaded here"),
        ("https://example.org/a/b.gguf", "models are not downloaded here: fetch the file first"),
        ("~/none.gguf", "expanduser()"),
        ("small.Q4_1.gguf", "no such file; did you mean small.Q4_0.gguf?"),
        ("small.Q4_0", "no such file; did you mean small.Q4_0.gguf?"),
        ("here/small.gguf", "here/small.gguf: no such file; check the path"),
    ],
)
def test_what_to_do_about_a_name(monkeypatch, tmp_path, text, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "small.Q4_0.gguf").write_bytes(b"GGUF")
    with pytest.raises(runtime.FileError) as caught:
        runtime.load(text)
    assert says in str(caught.value) and "\n" not in str(caught.value)
