"""The documentation's site: docs/, two files of the root, and pages that are generated from the code.

`pages.py` makes the generated pages as Markdown and needs only the packages of .venv. `hooks.py` is what mkdocs calls:
it adds these pages to those of docs/ and rewrites links between them. `pictures.py` draws the pictures of
docs/concepts/.
"""
