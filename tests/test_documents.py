"""The commands of README and docs: all are understood, and those that need nothing special are run, in order, in a new folder.

What needs more than this machine says so, in a comment of its line or in the first line of its block: `# needs ...`. What runs there is made small: the recipes' own
sizes are the business of other tests.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer

import raydiff
import raydiff.config
from raydiff.cli import app
from raydiff.search import load as load_sweep
from tests.data import shards
from tests.tiny import make_pipeline

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
# The pages in the order of mkdocs.yml, in which a reader meets them.
PAGES = [DOCS / page for page in re.findall(r"\w+\.md", (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2])]
DOCUMENTS = [ROOT / "README.md", ROOT / ".github" / "CONTRIBUTING.md", *PAGES]
PROGRAMS = ("raydiff", "make", "ray", "cluster/local.sh", "kubectl", "docker", "chmod", "export")


class Command(NamedTuple):
    document: str
    words: list[str]
    needs: str  # "" = nothing

    def __str__(self) -> str:
        return shlex.join(self.words)


def commands() -> Iterator[Command]:
    for document in DOCUMENTS:
        for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", document.read_text(), re.MULTILINE | re.DOTALL):
            if language in ("", "sh"):
                lines = block.replace("\\\n", " ").splitlines()
                for line in lines:
                    needs = re.search(r"#.*\bneeds (.*)", lines[0] if lines[0][0] == "#" else line)
                    if line[0] != "#":
                        yield Command(document.name, shlex.split(line, comments=True), needs[1] if needs else "")


COMMANDS = list(commands())


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_commands_are_understood(command: Command) -> None:
    """Files exist, recipes and overrides are valid, and options are those of the command line."""
    words = command.words
    assert words[0] in PROGRAMS, f"{command.document}: {command}"
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    if words[0] == "raydiff":
        understood(words[1:])
    if words[:3] == ["ray", "job", "submit"]:
        inner = words[words.index("--") + 1 :]
        inner = shlex.split(inner[2])[1:] if inner[0] == "sh" else inner
        assert inner[0] == "python" and (ROOT / inner[1]).is_file()
        if inner[1].startswith("jobs/"):
            understood([Path(inner[1]).stem, *inner[2:]])
    for word in words:
        if word.startswith(("jobs/", "cluster/", "benchmarks/", "docs/")) and "=" not in word:
            assert (ROOT / word).is_file(), f"{command.document}: {word}"


def test_every_page_is_in_the_site() -> None:
    assert sorted(PAGES) == sorted(DOCS.glob("*.md"))


def links(document: Path) -> list[str]:
    """Where the links and pictures of a document lead, outside of code."""
    text = re.sub(r"^```.*?^```$|`[^`\n]*`", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"\]\(([^)\s]*)\)", text) + re.findall(r"(?:href|src)=\"([^\"]*)\"", text)


def anchors(document: Path) -> set[str]:
    """The headings of a page as GitHub and mkdocs name them in a link."""
    text = re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def broken(document: Path, site: Path | None = None) -> list[str]:
    """The relative links of a document that lead nowhere. `site`: they must also stay in this folder."""
    found = []
    for link in links(document):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        inside = site is None or target.is_relative_to(site)
        if not target.exists() or not inside or (anchor and anchor not in anchors(target)):
            found.append(link)
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    """A page of docs/ links to what the site has: a file elsewhere in the repository is named by its path."""
    assert not (wrong := broken(document, DOCS if document.parent == DOCS else None)), wrong


def test_a_link_that_leads_nowhere_is_found(tmp_path: Path) -> None:
    (tmp_path / "there.md").write_text("# A win rate, measured\n\n```\n# no heading\n```\n")
    page = tmp_path / "page.md"
    page.write_text(
        "# Page\n[a](there.md) [b](there.md#a-win-rate-measured) [c](#page) [d](https://elsewhere) `[e](code.md)`\n"
        "[f](gone.md) [g](there.md#no-heading) [h](#gone) ![i](gone.png) [j](../outside.md)\n"
    )
    (tmp_path.parent / "outside.md").write_text("")
    assert broken(page, tmp_path) == ["gone.md", "there.md#no-heading", "#gone", "gone.png", "../outside.md"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_documents_name_files_that_exist(document: Path) -> None:
    paths = re.findall(r"`((?:benchmarks|cluster|docs|jobs|raydiff|tests)/[\w./-]+\.\w+)`", document.read_text())
    assert not (gone := [path for path in paths if not (ROOT / path).exists()]), gone


@pytest.mark.parametrize("job", sorted((ROOT / "jobs").glob("*.py")), ids=lambda p: p.stem)
def test_jobs_are_thin(job: Path) -> None:
    assert len(job.read_text().splitlines()) <= 40
    done = subprocess.run([sys.executable, str(job), "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_job_is_there() -> None:
    assert {job.stem for job in (ROOT / "jobs").glob("*.py")} == {"train", "generate", "score", "evaluate", "sweep", "bench"}


def understood(arguments: list[str]) -> None:
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands"):
        command, arguments = command.commands[arguments[0]], arguments[1:]
    context = command.make_context("raydiff", [a for a in arguments if a != "..."])
    recipe, overrides = context.params.get("recipe"), context.params.get("overrides") or ()
    if recipe is not None and Path(recipe).parts[0] == "jobs":
        raydiff.load(ROOT / recipe, [o for o in overrides if "$" not in o])
    if command.name == "sweep":
        load_sweep(ROOT / context.params["file"])


LONG = {  # in a sweep file
    r'"train.updates" = \d+': '"train.updates" = 2',
    r'"evaluate.every" = \d+': '"evaluate.every" = 1',
    r"grace = \d+": "grace = 20",
    r'"optimizer.lr" = {choice = .*}': '"optimizer.lr" = {choice = [1e-3]}',
}
SMALL = {  # options that a command gets behind its own
    "train": ["train.updates=1", "evaluate.images=4", "evaluate.drift_images=0", "sampler.steps=2", "batch.size=4", "batch.micro=2"],
    "evaluate": ["--images=4", "--per-prompt=2"],
    "generate": ["--steps=2"],
    "from-rewards": ["sampler.steps=2", 'prompts.train=["a cat", "a dog"]'],
    "encode": ["sampler.steps=2"],
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout's jobs, made small, and the files that the documents name."""
    place = tmp_path_factory.mktemp("place")
    shutil.copytree(ROOT / "jobs", place / "jobs")
    for sweep in (place / "jobs" / "sweeps").iterdir():
        text = sweep.read_text()
        for long, short in LONG.items():
            text = re.sub(long, short, text)
        sweep.write_text(text)
    make_pipeline(place / "my-sd15")
    pairs = ROOT / "jobs" / "recipes" / "emoji_dpo.toml"
    (place / "RECIPE").write_text(
        raydiff.config.dump(raydiff.load(pairs, ["pairs.path=feedback.parquet", "evaluate.images=4"]))
    )
    shutil.copy(ROOT / "jobs" / "recipes" / "emoji_draft_lv.toml", place / "RUN.toml")
    (place / "pickapic_v2" / "data").mkdir(parents=True)
    shards.pickapic(place / "pickapic_v2" / "data" / "train-0.parquet", 20)
    pq.write_table(pa.table({"prompt": ["a cat", "a dog", "a fish"]}), place / "prompts.parquet")
    pq.write_table(pa.table({"jpg": [shards.picture(shards.BLUE, 0)], "prompt": ["a cat"]}), place / "photos.parquet")
    (place / "unseen.txt").write_text("a yak\na heron\n")
    return place


def runs(command: Command) -> bool:
    """Whether a test can run it. `make test` is what runs this."""
    return not command.needs and command.words[0] in ("raydiff", "make") and command.words[1] != "test"


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("command", [c for c in COMMANDS if runs(c)], ids=str)
def test_commands_run(command: Command, place: Path) -> None:
    """One after the other, as later ones use what earlier ones made."""
    words = command.words
    if words[0] == "make":
        (line,) = re.findall(rf"^{words[1]}:.*\n\t\$\(BIN\)/(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
        words = shlex.split(line)
    small = next((options for name, options in SMALL.items() if name in words[1:3]), [])
    if words[1] == "sweep" and "--resume" in words:
        interrupted(words[: words.index("--resume")], place)
    words = [filled(word, place, words) for word in [*words, *small]]
    with called(words, place) as process:
        said = process.communicate(timeout=390)[0]
    assert process.returncode == 0, f"{shlex.join(words)}\n{said[-4000:]}"


def called(words: list[str], place: Path) -> subprocess.Popen[str]:
    command = [str(Path(sys.executable).with_name("raydiff")), *words[1:]]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=place, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def interrupted(words: list[str], place: Path) -> None:
    """Ctrl-C in a sweep, when a trial has finished."""
    before = set(place.glob("runs/*/*/finished.json"))
    with called(words, place) as process:
        while set(place.glob("runs/*/*/finished.json")) == before:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=120)


def filled(word: str, place: Path, words: list[str]) -> str:
    """A word with its placeholders replaced: NAME is the newest run of that kind."""
    if "NAME" in word and "=" not in word:
        model = str(place / "my-sd15") if "/models/my-sd15" in words else "embedded"
        kind = "sweep.json" if words[1] == "sweep" else "run.json"
        there = list((place / "runs").glob(f"*/{kind}"))
        if kind == "run.json":
            there = [file for file in there if json.loads(file.read_text())["model"]["path"] == model]
        word = word.replace("NAME", max(there, key=lambda file: file.stat().st_mtime).parent.name)
    return word.replace("/models/my-sd15", str(place / "my-sd15")).replace("/shared", str(place / "shared"))
