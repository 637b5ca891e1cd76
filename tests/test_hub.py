"""Weights on a server."""

from training import transfer


def test_an_empty_cache_variable_is_not_the_current_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, "")
    assert transfer.imagenet_file().parent == tmp_path / ".cache" / "torch" / "hub" / "checkpoints"
