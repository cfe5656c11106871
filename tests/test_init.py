"""The public names of the package."""

import subprocess
import sys

import terseformer


def test_every_public_name_is_what_it_says_whatever_was_imported_before():
    for name in terseformer.__all__:
        value = getattr(terseformer, name)
        assert callable(value), name
        assert value.__name__ == name


def test_import_is_light():
    code = "import sys, terseformer; assert not {'torch', 'numpy', 'tyro'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_name():
    assert not hasattr(terseformer, "no_such_name")
