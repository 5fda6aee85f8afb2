"""What makes a site of this repository's pages: README.md is the first page, and links to files work.

The pages are written for a code host, where a link may lead to any file of the repository. A site holds
docs/ alone. So pictures and tables that a page links to are copied, and a linked source file or folder
becomes a page that shows it.
Run: make docs
"""
import posixpath
import re
import unicodedata
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
COPIED = (".png", ".jpg", ".svg", ".csv", ".json", ".jsonl")
LANGUAGES = {".py": "python", ".sh": "bash", ".toml": "toml", ".yml": "yaml"}
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCE = re.compile(r"(\s*)(```+|~~~+)\s*(\w*)")


def on_config(config):
    """Headings get the anchors that the code hosts give them, so that a link works in both places."""
    config.mdx_configs.setdefault("toc", {})["slugify"] = lambda text, separator: slug(text)
    return config


def slug(text):
    """A heading's anchor: letters, decimal digits, "_" and "-" stay, in lower case; a space becomes "-"."""
    good = ("Lu", "Ll", "Lt", "Lm", "Lo", "Mn", "Mc", "Me", "Nd", "Nl", "Pc")  # Unicode's categories
    kept = [c for c in text.strip().lower() if c in "- " or unicodedata.category(c) in good]
    return "".join(kept).replace(" ", "-")


def on_files(files, config):
    """Adds README.md as index.md, and each file outside of docs/ that a page links to."""
    files.append(File.generated(config, "index.md", abs_src_path=str(ROOT / "README.md")))
    pages = [(home(file.src_uri), file.content_string) for file in files.documentation_pages()]
    linked = set()
    for page, text in pages:
        rewrite(text, lambda target: linked.add(in_repository(page, target)))
    for path in sorted(linked - {None}):
        source = ROOT / path
        if site_path(path) in files.src_uris or not source.exists():
            continue  # a page of docs/; or a dead link, which mkdocs itself reports
        if path.endswith(COPIED):
            files.append(File.generated(config, path, abs_src_path=str(source)))
        else:
            files.append(File.generated(config, site_path(path), content=shown(path, source)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links that leave docs/ lead to what on_files has added."""
    here = page.file.src_uri

    def moved(target):
        path = in_repository(home(here), target)
        if path is None or site_path(path) not in files.src_uris:
            return target
        anchor = target.partition("#")[2] if path.endswith(".md") else ""  # a file's page has no #L10
        link = posixpath.relpath(site_path(path), posixpath.dirname(here) or ".")
        return f"{link}#{anchor}" if anchor else link
    return rewrite(markdown, moved)


def home(src_uri):
    """Where a page of the site lies in the repository."""
    return "README.md" if src_uri == "index.md" else f"docs/{src_uri}"


def site_path(path):
    """What a file of the repository is called in the site: the inverse of `home`, with files/ for sources."""
    if path == "README.md":
        return "index.md"
    if path.startswith("docs/") and path.endswith(".md"):
        return path.removeprefix("docs/")
    return path if path.endswith(COPIED) else f"files/{path}.md"


def in_repository(page, target):
    """The path from the repository's root that a link of a page means; None: not a file of it."""
    path = target.partition("#")[0]
    if not path or re.match(r"[a-z]+:|/", path):
        return None
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), path))
    return None if path.startswith("..") else path


def rewrite(text, change):
    """The text with change(target) in place of every link's target; code blocks and code spans stay.

    A fence's words after the language (```bash quick) are dropped: Python's Markdown knows no such block.
    """
    lines, fence = [], None
    for line in text.split("\n"):
        opened = FENCE.match(line)
        if fence is None and opened:
            fence, line = opened[2], "".join(opened.groups())
        elif fence is not None:
            fence = None if line.strip() == fence else fence
        else:
            parts = re.split(r"(`+[^`]*`+)", line)
            parts[::2] = [LINK.sub(lambda found: f"]({change(found[1]) or found[1]})", part)
                          for part in parts[::2]]
            line = "".join(parts)
        lines.append(line)
    return "\n".join(lines)


def shown(path, source):
    """A page that shows a text file, or the names in a folder."""
    if source.is_dir():
        text, language = "\n".join(sorted(entry.name for entry in source.iterdir())), "text"
    else:
        text, language = source.read_text(encoding="utf-8"), LANGUAGES.get(source.suffix, "text")
    fence = "`" * 5
    return f"---\nsearch:\n  exclude: true\n---\n\n# `{path}`\n\n{fence}{language}\n{text}\n{fence}\n"
