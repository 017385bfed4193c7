"""Self-contained web pages: jinja2 templates, with style, script and pictures inside."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).with_name("pages"), encoding="utf-8"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def render(template: str, **values: object) -> str:
    """The page that a template of pages/ makes of the values; text among them is escaped."""
    return TEMPLATES.get_template(template).render(values)
