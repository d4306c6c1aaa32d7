"""The examples in docstrings print what they say: of what people import, a file a method, an edit and an attack."""

import doctest
import importlib

import pytest

from jaxsafety import attacks, edits, methods

MODULES = (*methods.TABLE.values(), *edits.TABLE.values(), *attacks.TABLE.values(), "jaxsafety.subjects.judge")


@pytest.fixture(scope="module")
def examples():
    """By module, the examples that there are."""
    finder = doctest.DocTestFinder()
    modules = [importlib.import_module(name) for name in MODULES]
    found = {module.__name__: [one for one in finder.find(module) if one.examples] for module in modules}
    return {name: own for name, own in found.items() if own}


@pytest.mark.usefixtures("unchecked")
def test_examples_print_what_they_say(examples):
    told = []
    for own in examples.values():
        runner = doctest.DocTestRunner(verbose=False)
        for one in own:
            runner.run(one, out=told.append)
    assert not told, "".join(told)
    assert len(examples) >= 20
