"""What MkDocs needs to read pages that are also read in the repository.

A page may link to any file of the repository, relative to itself. Links out of ``docs/`` lead to copies in the site,
below ``repository/``; Markdown and Python files and folders become pages there. The second word behind the language of
a fence, which tells the tests why a block cannot run, is left out.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
COPIES = "repository"
CODE_OR_LINK = re.compile(
    r"^(?P<fence>```+)(?P<language>\w*)[^\n]*(?P<code>\n.*?^(?P=fence)$)"
    r"|`[^`\n]+`"
    r"|(?<=\]\()(?![a-z]+:|#)(?P<link>[^)#\s]+)",
    re.MULTILINE | re.DOTALL,
)
NOT_SEARCHED = "---\nsearch:\n  exclude: true\n---\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files outside docs/ that a page, or a page made of such a file, links to."""
    waiting = list(files.documentation_pages())
    while waiting:
        page = waiting.pop()
        for path in outside(page):
            if files.get_file_from_path(uri_of(path)) is None:
                added = copy_of(path, config)
                files.append(added)
                waiting.extend([added] if added.is_documentation_page() else [])
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point the links at the site's own files, and leave out the words behind the languages of fences."""
    here = PurePosixPath(page.file.src_uri).parent

    def moved(match: re.Match[str]) -> str:
        if match["fence"]:
            return match["fence"] + match["language"] + match["code"]
        if match["link"]:
            return os.path.relpath(uri_of(target(page.file, match["link"])), here)
        return match[0]

    return CODE_OR_LINK.sub(moved, markdown)


def target(page: File, link: str) -> str:
    """The path that the link of a page means, relative to the repository."""
    uri = PurePosixPath(page.src_uri)
    source = uri.relative_to(COPIES) if uri.is_relative_to(COPIES) else "docs" / uri
    return os.path.normpath(source.parent / link)


def uri_of(path: str) -> str:
    """Where the site has the file of the repository at `path`."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    made_page = (ROOT / path).is_dir() or path.endswith(".py")
    return f"{COPIES}/{path}.md" if made_page else f"{COPIES}/{path}"


def outside(page: File) -> Iterator[str]:
    """The existing files outside docs/ that a page links to."""
    for match in CODE_OR_LINK.finditer(page.content_string):
        path = target(page, match["link"] or "")
        if match["link"] and not path.startswith(("docs/", "..")) and (ROOT / path).exists():
            yield path


def copy_of(path: str, config: MkDocsConfig) -> File:
    """The file of the repository at `path` as a file of the site. The search leaves it out."""
    source, uri = ROOT / path, uri_of(path)
    if source.is_dir():
        names = sorted(entry.name for entry in source.iterdir() if not entry.name.startswith((".", "_")))
        lines = "".join(f"- [{name}]({source.name}/{name})\n" for name in names)
        made = File.generated(config, uri, content=f"{NOT_SEARCHED}# {path}\n\n{lines}")
    elif source.suffix == ".py":
        made = File.generated(config, uri, content=f"{NOT_SEARCHED}# {path}\n\n````python\n{source.read_text()}````\n")
    elif source.suffix == ".md":
        made = File.generated(config, uri, content=NOT_SEARCHED + source.read_text())
    else:
        made = File.generated(config, uri, abs_src_path=str(source))
    made.inclusion = InclusionLevel.NOT_IN_NAV
    return made
