"""What the documents tell a reader to type exists: scripts, flags, recipes, profiles. Both READMEs say the same."""

import ast
import contextlib
import importlib.util
import io
import re
import shlex
import sys

import pytest
import tyro

from conftest import ROOT, SCRIPTS

PAGES = [ROOT / name for name in ("README.md", "README_zh.md", "CONTRIBUTING.md", "processed_data/README.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
PAGES = [page for page in PAGES if page.name != "LOG.md"]  # the log tells of commands as they were


def commands(page) -> list[str]:
    """The command lines of a page: in bash blocks, and as code that begins like one."""
    text = page.read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"(?s)```bash\n(.*?)```", text)).replace("\\\n", " ")
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"(?s)```.*?```", "", text))
    lines = [line.split("  #")[0].strip() for line in [*blocks.splitlines(), *inline]]
    lines = [re.sub(r"^(?:[A-Z_]+=\S+ +)+", "", line) for line in lines]
    ours = re.compile(r"(python|bash|accelerate launch|\$launch) (.* )?(scripts|runs|benchmarks)/(?!NN_)")
    return [line for line in lines if ours.match(line)]


def settings_of(script):
    spec = importlib.util.spec_from_file_location("stage_" + script.stem, script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.Settings


def refused(settings: type, words: list[str]) -> str:
    """Why a stage would not read these words: an unknown flag, a value that is missing or of the wrong type."""
    with contextlib.redirect_stderr(io.StringIO()) as told, contextlib.redirect_stdout(told):
        try:
            unknown = tyro.cli(settings, args=words, return_unknown_args=True)[1]
        except SystemExit:
            return told.getvalue()
    return " ".join(unknown)


def faults(lines: list[str]) -> list[str]:
    """What is wrong with command lines: no such script, flag, value or profile."""
    wrong = []
    for line in lines:
        words = shlex.split(re.sub(r"\{[^}]*\}|\$\([^)]*\)", "x", line))
        place = next(i for i, word in enumerate(words) if re.match(r"(scripts|runs|benchmarks)/", word))
        file = ROOT / words[place]
        if not file.is_file():
            wrong.append(f"{line}: no {words[place]}")
        elif file.parent == SCRIPTS:
            given = [word for word in words[place + 1 :] if word not in ("--help", "...")]
            if fault := refused(settings_of(file), given):
                wrong.append(f"{line}: {fault}")
        elif file.parent.name == "benchmarks":
            text = file.read_text(encoding="utf-8")
            given = [word for word in words[place + 1 :] if word.startswith("--") or file.suffix == ".sh"]
            wrong += [f"{line}: {file.name} knows no {word}" for word in given if word.split("=")[0] not in text]
        elif file.suffix == ".sh" and (
            start := re.search(r'^start \w+ "(.*?)"', file.read_text(encoding="utf-8"), re.M)
        ):
            known = {*start[1].split(), "--quick", "--overwrite", "--print"}
            wrong += [f"{line}: {file.name} knows no {word}" for word in words[place + 1 :] if word not in known]
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_command_of_a_page_could_be_typed(page):
    assert not faults(commands(page))


def test_a_command_that_a_stage_would_refuse_is_found():
    bad = ["12_prepare_styles.py --balance --augment 2", "20_train_sft.py --lr fast", "20_train_sft.py --no-such 1"]
    assert len(faults([f"python scripts/{line}" for line in bad])) == 3
    assert not faults(["python scripts/12_prepare_styles.py --balance oversample --augment 2"])


PRELOAD = ROOT / "benchmarks/preload.py"  # is imported, not run
SCRIPTS_WITH_COMMANDS = [
    *sorted(SCRIPTS.glob("[0-9]*.py")),
    *(path for place in ("benchmarks", "runs") for path in sorted((ROOT / place).glob("*.py")) if path != PRELOAD),
]


@pytest.mark.parametrize("script", SCRIPTS_WITH_COMMANDS, ids=lambda script: script.name)
def test_the_commands_that_open_a_script_could_be_typed(script):
    told = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8")))
    block = re.search(r"(?ms)^Run     (.*?)(?:\n\n|\Z)", told)[1]
    lines = [line.strip() for line in block.replace("\\\n", " ").splitlines()]
    begins = re.compile(r"(export |[A-Z_]+=|python (scripts|benchmarks|runs)/|accelerate launch |ollama )")
    assert lines and not [line for line in lines if not begins.match(line)], "a command is broken over two lines"
    ours = [re.sub(r"^(?:[A-Z_]+=(?:\$\([^)]*\)|\S+) +)+", "", line) for line in lines]
    assert not faults([line for line in ours if re.search("(scripts|benchmarks|runs)/", line)])


# images and private words, and what to write instead
NOT_PLAIN = {
    "mend": "fix",
    "pulls nowhere": "gets advantage 0",
    "said aloud": "a notice is printed",
    "what stood there": "position bias",
    "shares to climb by": "dense rewards",
    "a price on": "a penalty",
    "the dear part": "the slowest part",
    "costs nothing of": "never destroys",
}


def test_words_are_plain():
    places = ("scripts", "benchmarks", "runs", "tests", "docs")
    files = [path for place in places for path in (ROOT / place).rglob("*") if path.suffix in (".py", ".sh", ".md")]
    found = [
        f"{path.relative_to(ROOT)}: {word} (write: {instead})"
        for path in files
        if path.name != "test_docs.py"
        for text in [path.read_text(encoding="utf-8")]
        for word, instead in NOT_PLAIN.items()
        if re.search(rf"(?<![a-z]){word}(?![a-z])", text)
    ]
    assert not found


def test_the_commands_of_the_benchmarks_could_be_typed():
    lines = (ROOT / "benchmarks/all.sh").read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    told = [match[0] for line in lines if (match := re.search(r"(?:python|bash) (?:benchmarks|runs)/[^;&|}]*", line))]
    assert len(told) > 8 and not faults([re.sub(r"\$quick|\S*\$\(?[^ ]*", "", line) for line in told])
    parts = re.search(r"parts=\((.*?)\)", "\n".join(lines))[1].split()
    assert all(f"{part}() {{" in "\n".join(lines) for part in parts)


def test_both_readmes_have_the_same_commands_and_figures():
    english, chinese = (ROOT / "README.md", ROOT / "README_zh.md")
    assert sorted(commands(english)) == sorted(commands(chinese))

    def figures(page):
        rows = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
        return [numbers for row in rows if len(numbers := re.findall(r"\d*\.\d{3}|–", row)) > 3]

    assert figures(english) == figures(chinese) and len(figures(english)) > 5
    for page in (english, chinese):
        assert len(page.read_text(encoding="utf-8").splitlines()) < 200


def test_the_guide_in_chinese_goes_from_data_to_a_model_of_ones_own():
    lines = commands(ROOT / "docs/zh/指南.md")
    stages = [match[1] for line in lines if (match := re.search(r"scripts/(\d\d)_", line))]
    assert {"01", "17", "19", "20", "22", "63", "60", "70", "72", "24"} <= set(stages)
    assert stages.index("17") < stages.index("19") < stages.index("20") < stages.index("22") < stages.index("60")


def test_documents_are_short():
    """A page answers one question and can be read in minutes; tables and long links may be wider than prose."""
    pages = sorted((ROOT / "docs").rglob("*.md"))
    words = [word for page in pages for word in page.read_text(encoding="utf-8").split() if re.search(r"\w", word)]
    assert len(words) <= 18_000
    wide = [
        f"{page.name}:{number}"
        for page in [*pages, ROOT / "README.md", ROOT / "README_zh.md", ROOT / "processed_data/README.md"]
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > 120 and not line.lstrip().startswith(("|", "!["))
    ]
    assert not wide


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert not [link for link in links if "://" not in link and not (page.parent / link).exists()]


def test_the_pages_that_the_code_names_are_there():
    files = [
        path for place in ("scripts", "runs", "benchmarks", "tests", "configs") for path in (ROOT / place).rglob("*")
    ]
    named = {
        (path.relative_to(ROOT).as_posix(), page)
        for path in files
        if path.suffix in (".py", ".sh", ".yaml")
        for page in re.findall(r"docs/[\w/]+\.md", path.read_text(encoding="utf-8"))
    }
    assert len(named) > 20
    assert not [(path, page) for path, page in named if not (ROOT / page).is_file()]
