"""How Sphinx makes a site of these pages, the notebooks and the docstrings: `make docs`."""

import ast
import dataclasses
import inspect
import re
import textwrap

import scanax

project = "scanax"
release = scanax.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc"]
html_theme = "furo"
html_title = f"scanax {release}"
html_copy_source = False

myst_heading_anchors = 3
nb_execution_mode = "off"  # what the notebooks show is what is stored in them

default_role = "code"  # docstrings write code in single backticks
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_default_options = {
    "members": True,
    "special-members": "__call__",
    "inherited-members": "Module,Variable,Exception",  # these classes' own are not ours
    "no-value": True,
}
python_maximum_signature_line_length = 80

OUTWARD = re.compile(r"\[([^]]+)\]\((\.\./[^)#\s]+)(#[^)\s]*)?\)")


def links(app, page, source):
    """Links that lead out of a page's folder in the repository, as they are in the site.

    Notebooks lie in a folder of the pages there; of files that are not in it only the name stays.
    """
    here, other = ("notebooks", "docs") if page.startswith("notebooks/") else ("docs", "notebooks")
    up = "../" if here == "notebooks" else "notebooks/"

    def changed(link):
        text, path, anchor = link.groups()
        if not path.startswith(f"../{other}/"):
            return text
        return f"[{text}]({up}{path.removeprefix(f'../{other}/')}{anchor or ''})"

    source[0] = OUTWARD.sub(changed, source[0])


def signature(app, what, name, thing, options, arguments, result):
    """As it is written in the source. Fields of a dataclass stand below it, with docstrings."""
    if not getattr(thing, "__module__", "").startswith("scanax."):
        return None
    if what not in ("class", "function", "method") or dataclasses.is_dataclass(thing):
        return ("", None) if what == "class" else None
    source = inspect.getsource(thing.__init__ if what == "class" else inspect.unwrap(thing))
    function = ast.parse(textwrap.dedent(source)).body[0]
    own = function.args.args
    del own[: bool(own) and own[0].arg == "self"]
    return f"({ast.unparse(function.args)})", function.returns and ast.unparse(function.returns)


def docstring(app, what, name, thing, options, lines):
    """An indented block after a colon is shown as it is written."""
    text = re.sub(r":\n\n?(?=    )", "::\n\n", "\n".join(lines))
    lines[:] = text.split("\n")


def setup(app):
    app.connect("source-read", links)
    app.connect("autodoc-process-signature", signature)
    app.connect("autodoc-process-docstring", docstring)
