"""What the docstrings need to be read by mkdocstrings, which knows neither `Example:` nor roles."""

import re
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """Reads `Example:` as a section of examples, and :func:`name` as `name`."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            text = re.sub(r'^Example:$', 'Examples:', obj.docstring.value, flags=re.M)
            obj.docstring.value = re.sub(r':(?:func|class|mod|meth):(?=`)', '', text)
