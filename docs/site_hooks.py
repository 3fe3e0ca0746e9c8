"""MkDocs hook: the docstrings' formulas stay readable as TeX, without the markers that only Sphinx knows."""

from __future__ import annotations

import re
from typing import Any


def on_page_content(html: str, **_: Any) -> str:
    html = re.sub(r"<p>\.\. math::\s*(.*?)</p>", r"<pre><code>\1</code></pre>", html, flags=re.DOTALL)
    return html.replace(":math:<code>", "<code>")
