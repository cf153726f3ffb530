"""The description of the endpoints by OpenAPI, in ``openapi.yaml``, and as a page to read.

The page is plain HTML of our own, since the usual ones load their scripts from the internet.
"""

from __future__ import annotations

from functools import cache
from html import escape
from pathlib import Path
from typing import Any

import yaml

from teamnet_pl import __version__

_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>TeamNet server</title>
<style>
  :root {{ color-scheme: light dark }}
  body {{ max-width: 50em; margin: 2em auto; padding: 0 1em; font: 1em/1.5 sans-serif }}
  table {{ border-collapse: collapse }}
  td {{ border-top: 1px solid gray; padding: .3em 1em .3em 0; vertical-align: top }}
  pre {{ overflow-x: auto }}
</style>
<h1>TeamNet server {version}</h1>
<p>{description}
<a href="openapi.json">openapi.json</a> describes the endpoints for other programs.</p>
<pre>curl --data-binary @photo.jpg 'ADDRESS/predict?budget_ms=20'
curl -F image=@one.jpg -F image=@another.jpg ADDRESS/predict</pre>
{sections}
</html>
"""


@cache
def description() -> dict[str, Any]:
    """Reads the description of the endpoints, an OpenAPI document."""
    content: dict[str, Any] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
    content["info"]["version"] = __version__
    return content


@cache
def page() -> str:
    """Writes the description as a page of HTML that loads nothing."""
    content = description()
    sections = [
        _section(f"{method.upper()} {path}", operation, content["components"]["responses"])
        for path, operations in content["paths"].items()
        for method, operation in operations.items()
    ]
    return _PAGE.format(
        version=escape(__version__),
        description=escape(content["info"]["description"]),
        sections="\n".join(sections),
    )


def _section(title: str, operation: dict[str, Any], responses: dict[str, Any]) -> str:
    rows = [
        (parameter["name"], parameter["description"])
        for parameter in operation.get("parameters", [])
    ]
    for status, response in operation["responses"].items():
        shared = responses.get(response.get("$ref", "").rpartition("/")[2], {})
        rows.append((status, (shared | response)["description"]))
    lines = [f"<tr><td><code>{escape(n)}</code><td>{escape(text)}" for n, text in rows]
    heading = f"<h2><code>{escape(title)}</code></h2>\n<p>{escape(operation['summary'])}</p>"
    return "\n".join([heading, "<table>", *lines, "</table>"])
