"""processed_data/sample: the rows that a reader looks at are those that the stages write, and its README names them."""

import subprocess

import pytest

from common.jsonl import read_jsonl
from conftest import ROOT

SAMPLE = ROOT / "processed_data/sample"
FILES = sorted(SAMPLE.glob("*/*.jsonl"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_a_sample_is_of_its_format_and_the_readme_names_it(file):
    kind = file.stem.split("_")[0]
    schema = {"pref": "preference", "golden": None, "rejected": None}.get(kind, kind)
    rows = read_jsonl(file, schema)
    assert len(rows) == 2
    page = (ROOT / "processed_data/README.md").read_text(encoding="utf-8")
    assert f"`{file.name}`" in page or f"`{kind}_*.jsonl`" in page


def test_the_stages_write_these_rows(tmp_path):
    jobs = ("styles", "chat", "text")
    command = ["bash", str(ROOT / "runs/samples.sh"), str(tmp_path), *jobs]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    made = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.glob("*/*.jsonl")}
    assert made == {path.relative_to(SAMPLE): path.read_bytes() for path in FILES if path.parent.name in jobs}
    assert len(made) > 5 and len({path.parent.name for path in FILES}) == 6
