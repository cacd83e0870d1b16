"""The README's own example runs as it stands."""

import re
from pathlib import Path

import kvfs

README = Path(__file__).parents[2] / "README.md"


def test_the_example_runs(tmp_path: Path, capsys) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert "/tmp/kvfs/" in example
    exec(compile(example.replace("/tmp/kvfs/", f"{tmp_path}/"), str(README), "exec"), {})
    assert capsys.readouterr().out == "(256, 30, 2, 3, 64) True\n"
    with kvfs.open_pool(tmp_path / "kv0") as pool:
        assert [context.name for context in pool.namespace("smollm2").contexts()] == ["chat/42"]
