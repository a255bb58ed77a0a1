"""MkDocs hooks that add files outside ``docs/`` as pages, and adapt links between files of the repository to the site.

The documents link to each other and to source files with relative paths, so that the links also work on a code host.
"""

from __future__ import annotations

import contextlib
import io
import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PAGES = {  # files outside docs/, and the pages that show them
    "ARCHITECTURE.md": "explanation/architecture.md",
    "CHANGELOG.md": "reference/changelog.md",
    "CONTRIBUTING.md": "how_to/contributing.md",
    "SECURITY.md": "reference/security.md",
    "benchmarks/RESULTS.md": "reference/measurements.md",
    "examples/one_page.py": "explanation/one_page.md",
}
FILES = {page: file for file, page in PAGES.items()}
NOTEBOOKS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("notebooks/*.ipynb"))
LINK = re.compile(r"(?P<text>\[[^\[\]]*\])\((?P<path>[^()\s:#]+)(?P<anchor>#[^()\s]*)?\)")
HELP = re.compile(r"<!-- help: ?(.*?) -->")


@event_priority(100)  # before mkdocs-jupyter, which renders the notebooks
def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the files of ``PAGES`` and the notebooks."""
    for file, page in PAGES.items():
        text = (ROOT / file).read_text(encoding="utf-8")
        if file.endswith(".py"):
            title = text.removeprefix('"""').partition(":")[0]
            text = f"# {title}\n\n`{file}`:\n\n```python\n{text}```\n"
        files.append(File.generated(config, page, content=text))
    for notebook in NOTEBOOKS:
        files.append(File(notebook, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Adapts the links of a page, and replaces ``<!-- help: COMMAND -->`` with the output of ``COMMAND --help``."""
    if page.file.src_uri.endswith(".ipynb"):
        return markdown
    with_help = HELP.sub(lambda match: f"```text\n{help_of(match[1].split())}```", markdown)
    return "".join(adapted(with_help, page.file.src_uri))


def adapted(markdown: str, page: str) -> Iterator[str]:
    """Yields the parts of the text of a page, with links to pages of the site or to objects of the API."""
    folder = posixpath.dirname(FILES.get(page, f"docs/{page}"))
    end = 0
    for link in LINK.finditer(markdown):
        yield markdown[end : link.start()]
        end = link.end()
        target = posixpath.normpath(posixpath.join(folder, link["path"]))
        if target in PAGES or target in NOTEBOOKS or target.startswith("docs/"):
            shown = PAGES.get(target, target.removeprefix("docs/"))
            yield f"{link['text']}({os.path.relpath(shown, posixpath.dirname(page) or '.')}{link['anchor'] or ''})"
        elif target.startswith("src/") and (name := re.fullmatch(r"\[`(\w+(?:\.(?!py`)\w+)*)`\]", link["text"])):
            module = target.removeprefix("src/").removesuffix(".py").replace("/", ".")
            yield f"{link['text']}[{module}.{name[1]}]"  # a cross-reference to the API reference
        else:
            yield link["text"][1:-1]
    yield markdown[end:]


def help_of(words: list[str]) -> str:
    """Returns the output of ``cbsa WORDS --help``."""
    from cbsa_lightning.__main__ import main

    os.environ["COLUMNS"] = "100"  # the width that argparse uses
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        main([*words, "--help"])
    return output.getvalue().rstrip() + "\n"
