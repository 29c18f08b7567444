"""Build the documentation's site: `python -m experiments.site` writes it to site/; open site/index.html.

It needs the packages of requirements/docs.txt: `make docs-site` installs them into .venv-docs and builds there. A
warning is an error. `--docs` draws the pictures of docs/concepts/ again, which needs only .venv.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments import cli
from upge.errors import ConfigError

OUTPUT = cli.ROOT / "site"


def main(arguments: Sequence[str] | None = None) -> int:
    """Build the site or draw the pictures; return the exit code, 1 if the build warns, 2 on bad input."""
    return cli.run_command(_site, arguments, lambda everything: str(__doc__))


def _site(arguments: list[str]) -> int:
    if arguments == ["--docs"]:
        from experiments.site import pictures

        pictures.draw_all(pictures.FOLDER)
        return cli.DONE
    if arguments:
        raise ConfigError(f"'{arguments[0]}': give --docs, or nothing at all")
    return _build()


def _build() -> int:
    try:
        from mkdocs.commands.build import build
        from mkdocs.config import load_config
        from mkdocs.exceptions import Abort
    except ModuleNotFoundError as error:
        raise ConfigError(f"the package {error.name} is missing; run `make docs-site`") from error
    settings = cli.ROOT / "mkdocs.yml"
    if not settings.exists():
        raise ConfigError(f"{settings} does not exist; the site is built in a clone of the repository")
    # Print the warnings, as the mkdocs command does.
    logging.getLogger("mkdocs").addHandler(logging.StreamHandler())
    try:
        build(load_config(str(settings), site_dir=str(OUTPUT), strict=True))
    except Abort as stopped:
        print(f"error: {stopped}", file=sys.stderr)
        return cli.FAILED
    if loaded := from_network(OUTPUT):
        print(f"error: the site must be readable offline, but it loads {', '.join(loaded)}", file=sys.stderr)
        return cli.FAILED
    print(f"{OUTPUT / 'index.html'}")
    return cli.DONE


def from_network(folder: Path) -> list[str]:
    """The addresses of scripts, styles, fonts and pictures that the pages of a folder load from elsewhere."""
    tags = re.compile(r"<(?:script|link|img|iframe|source)\b[^>]*?\b(?:src|href)=\"?(https?://[^\s\">]+)")
    styles = re.compile(r"(?:@import|url\()\s*[\"']?(https?://[^\"')\s]+)")
    found = {}
    for path in sorted(folder.rglob("*")):
        if pattern := {".html": tags, ".css": styles}.get(path.suffix):
            found |= dict.fromkeys(pattern.findall(path.read_text("utf-8")))
    return list(found)


if __name__ == "__main__":
    sys.exit(main())
