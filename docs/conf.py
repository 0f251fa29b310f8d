"""The documentation site: the Markdown files of the repository as they lie, the notebook, and the docstrings.

Links between pages are those that work on GitHub; links to other files lead to the repository, if pyproject.toml says
where it is.
"""
import re
import tomllib
from pathlib import Path

from sphinx.errors import ExtensionError

import timm_awm

ROOT = Path(__file__).parents[1]
SOURCE = tomllib.loads((ROOT / 'pyproject.toml').read_text(encoding='utf-8'))['project']['urls']['Source']
if '//example.org/' in SOURCE:  # until a release sets it
    SOURCE = ''
NAVIGATION = {
    'Start': ['docs/tour', 'docs/own-pictures'],
    'Guides': ['docs/training', 'docs/own-loops', 'docs/look-inside', 'docs/hub', 'recipes/README'],
    'Background': ['hub/README', 'docs/speed', 'docs/method'],
    'Reference': ['docs/api', 'CHANGELOG', 'CONTRIBUTING', 'SECURITY'],
}

project = 'timm_awm'
author = copyright = 'The timm_awm authors'
extensions = ['myst_nb', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon']
root_doc = 'README'
include_patterns = ['README.md', *(f'{page}.*' for pages in NAVIGATION.values() for page in pages)]
exclude_patterns = ['.*', 'build', 'dist', 'output']  # not walked through

html_theme = 'furo'
html_title = 'timm_awm'
html_static_path, html_css_files = ['site.css'], ['site.css']
if SOURCE:
    html_theme_options = {'source_repository': SOURCE, 'source_branch': 'main', 'source_directory': ''}

highlight_language = 'none'  # where a page does not name one
default_role = 'py:obj'  # a name in backticks leads to its docstring, if it has one here
autodoc_member_order = 'bysource'
autodoc_inherit_docstrings = False
python_maximum_signature_line_length = 100
napoleon_numpy_docstring = False

myst_heading_anchors = 3
myst_enable_extensions = ['html_image']
nb_execution_mode = 'force'  # CI runs the notebook so; -D nb_execution_mode=off shows the outputs in the file
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 600
nb_merge_streams = True
nb_output_stderr = 'remove'


def setup(app):
    app.connect('source-read', adapt)
    app.connect('autodoc-skip-member', skip_field)
    app.connect('build-finished', finish)


def adapt(app, docname, source):
    """Adds the navigation to the first page, and gives links to files that are no pages the repository's address."""
    folder = (ROOT / docname).parent

    def link(match):
        path = (folder / match[2]).resolve()
        if not path.exists() or path.suffix in ('.md', '.ipynb', '.png'):
            return match[0]
        return f'[{match[1]}]({SOURCE}/blob/main/{path.relative_to(ROOT).as_posix()})' if SOURCE else match[1]

    source[0] = re.sub(r'(?<!!)\[([^][]*)\]\(([^()#:]+)\)', link, source[0])
    if docname == root_doc:
        for caption, pages in NAVIGATION.items():
            source[0] += '\n'.join(['\n```{toctree}', ':hidden:', f':caption: {caption}', '', *pages, '```', ''])


def skip_field(app, what, name, obj, skip, options):
    """Fields of named tuples stand in the signature already."""
    return True if 'Alias for field number' in (obj.__doc__ or '') else None


def finish(app, error):
    Path(app.outdir, 'index.html').write_text('<meta http-equiv="refresh" content="0; url=README.html">\n')
    missing = {f'timm_awm.{name}' for name in timm_awm.__all__} - app.env.domains.python_domain.objects.keys()
    if missing and not error:
        raise ExtensionError(f'docs/api.md lacks {sorted(missing)}: is there a docstring?')
