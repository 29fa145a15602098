"""docs/library.md is executed, from its first block to its last."""

import re
import subprocess
import sys
from pathlib import Path


def test_the_page_runs_from_the_first_block_to_the_last(repository: Path, tmp_path: Path) -> None:
    text = (repository / "docs" / "library.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) > 5
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "\n".join(blocks)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "attention.q_proj" in done.stdout
    assert "tied=True puts it on both" in done.stdout


def test_the_page_names_every_field_that_makes_a_variant(repository: Path) -> None:
    text = (repository / "docs" / "library.md").read_text(encoding="utf-8")
    fields = ("rank_stabilized", "dora", "freeze_A", "bias", "trainable_tokens", "tied", "split",
              "slot", "modules_to_save", "init")  # fmt: skip
    assert [name for name in fields if name not in text] == []
