"""``jaxsafety list``: what a recipe can name, read from the sources of the literal tables; none of it is imported."""

from jaxsafety import methods
from jaxsafety.config import tables


def methods_told(*, prefix: str = "") -> str:
    """Returns every method with its first line, and its fields behind ``prefix``: kind, default and meaning."""
    lines = []
    for name, module in methods.TABLE.items():
        lines.append(f"  {name}: {tables.summary(module)}")
        lines += [f"    {prefix}{field}" for field in tables.declared(module)]
    return "\n".join(lines)


def text() -> str:
    """Returns what ``jaxsafety list`` prints."""
    return (
        "methods, `method: NAME` in a recipe, or one of your own as `method: package.module:NAME`\n"
        "(a grid of a traced field is one compiled program, every value of a static one is another):\n"
        f"{methods_told()}\n"
    )
