"""Pages and documents made from Jinja templates that lie beside the code."""

from pathlib import Path
from typing import Any

from cifar_lab.runs.text import markdown


def render(template: Path, **values: Any) -> str:
    """Return a template filled in; in an HTML page, a value is text and never markup.

    In a template, `file("name")` is a file beside it as it is, and the filter `markdown` makes a
    value text that Markdown shows as it is.
    """
    import jinja2  # late: most commands render nothing
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(template.parent),
        autoescape=jinja2.select_autoescape(["html"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "allow_nan": False}
    environment.filters["markdown"] = markdown
    environment.globals["file"] = lambda name: Markup(
        template.with_name(name).read_text(encoding="utf-8")
    )
    page = environment.get_template(template.name).render(values)
    return page.encode("utf-8", "replace").decode()  # names of folders may be no Unicode
