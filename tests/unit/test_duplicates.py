"""No block of six lines appears twice in scripts/."""

import ast
from collections import defaultdict

from conftest import SCRIPTS

BLOCK = 6


def passed_over(tree: ast.Module):
    """Line numbers of imports, docstrings, and the fields of Settings with their help."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name.endswith("Settings"):
            found = [field for field in node.body if isinstance(field, ast.AnnAssign)]
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            found = [node]
        else:
            found = [node] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
        for part in found:
            yield from range(part.lineno, part.end_lineno + 1)


def code_lines(source: str) -> list[tuple[int, str]]:
    """(line number, line without its white space at the ends and doubled within) of what counts."""
    over = set(passed_over(ast.parse(source)))
    lines = ((number, " ".join(line.split())) for number, line in enumerate(source.splitlines(), 1))
    return [(number, line) for number, line in lines if number not in over and line and not line.startswith("#")]


def repeated(files) -> list[str]:
    """Pairs of places with six lines in common: one row a run, however long it is."""
    places = defaultdict(list)
    for path in files:
        lines = code_lines(path.read_text(encoding="utf-8"))
        for at in range(len(lines) - BLOCK + 1):
            block = lines[at : at + BLOCK]
            places[tuple(line for _, line in block)].append((path, at, block[0][0]))
    known, rows = set(), []
    for block, found in places.items():
        for (path, at, number), (other, other_at, other_number) in zip(found, found[1:], strict=False):
            if (path, other, other_at - at) not in known:
                rows.append(
                    f"{path.relative_to(SCRIPTS)}:{number} and {other.relative_to(SCRIPTS)}:{other_number}: {block[0]}"
                )
            known.add((path, other, other_at - at))
    return rows


def test_no_block_of_six_lines_stands_twice():
    assert not repeated(sorted(SCRIPTS.rglob("*.py")))


def test_a_block_that_stands_twice_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.SCRIPTS", tmp_path)
    block = "".join(f"step_{index}()\n\n# why\n" for index in range(BLOCK))
    (tmp_path / "a.py").write_text("import os\n" + block)
    (tmp_path / "b.py").write_text("def f():\n" + "".join(f"    {line}\n" for line in block.splitlines()))
    assert repeated([tmp_path / "a.py"]) == []
    assert repeated([tmp_path / "a.py", tmp_path / "b.py"]) == ["a.py:2 and b.py:2: step_0()"]
