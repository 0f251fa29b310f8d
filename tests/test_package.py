import importlib
import pkgutil
from importlib.metadata import files, version
from importlib.resources import files as resources
from pathlib import Path
from types import ModuleType

import timm_awm

ROOT = Path(__file__).parents[1]


def test_the_package_carries_its_recipes_types_and_kernels():
    installed = {str(path) for path in files('timm-awm')}
    recipes = {f'timm_awm/{path.relative_to(ROOT)}' for path in (ROOT / 'recipes').rglob('*') if path.is_file()}
    assert len(recipes) > 2 and recipes <= installed
    assert (resources('timm_awm') / 'py.typed').is_file()
    assert (resources('timm_awm') / 'layers' / 'cpu.cpp').is_file()


def test_version_stands_in_the_changelog():
    assert timm_awm.__version__ == version('timm-awm')
    assert f'## {timm_awm.__version__} (' in (ROOT / 'CHANGELOG.md').read_text()


def test_no_module_is_hidden_by_a_function_of_its_name():
    for module in pkgutil.walk_packages(timm_awm.__path__, 'timm_awm.'):
        package, _, own = module.name.rpartition('.')
        assert isinstance(getattr(importlib.import_module(package), own, timm_awm), ModuleType), module.name
