"""Sphinx's settings for the site; copied beside the pages by build.py"""
import re

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml  # equations need neither a script nor a network

project = html_title = 'ressl_fastai'
copyright = author = 'ressl_fastai contributors'
extensions = ['myst_nb', 'sphinx_copybutton']
nb_execution_mode = 'off'  # outputs are those of the notebooks
nb_render_markdown_format = 'gfm'
myst_enable_extensions = ['dollarmath']
myst_all_links_external = True  # links were resolved before; check.py tries them all
suppress_warnings = ['myst.header', 'myst.xref_missing']
html_theme = 'furo'
html_static_path,html_css_files = ['_static'],['site.css']
html_extra_path,exclude_patterns = ['_extra'],['_extra']
html_favicon = html_logo = '_static/logo.svg'
myst_html_meta = {'property=og:image':'https://ressl-fastai.github.io/ressl_fastai/_static/card.png',
                  'property=og:title':'ressl_fastai', 'name=twitter:card':'summary_large_image',
                  'property=og:description':'Many images, few labels: learn the encoder from the images alone'}
html_show_sourcelink = False
html_copy_source = False
html_theme_options = dict(source_repository='https://github.com/ressl-fastai/ressl_fastai', source_branch='main',
                          source_directory='nbs/')


def math(block):
    def visit(self, node):
        tex = re.sub(r'\\[bB]igg?[lr]?(?![a-z])', '', node.astext())  # MathML's brackets grow by themselves
        made = tex2mathml(tex, as_block=block)
        self.body.append(f'<div class="equation">{made}</div>' if block else made)
        raise nodes.SkipNode
    return visit

def sort_tables(app, doctree, docname):
    "A class for the style sheet: `symbol` (a table of parameters), `wordy` (with sentences), `short`"
    for table in doctree.findall(nodes.table):
        cells = [o.astext() for o in table.findall(nodes.entry)]
        of_symbol = cells[1:2]==['Type']
        longest = max(map(len, cells))
        table['classes'].append('symbol' if of_symbol else 'wordy' if longest>60 else 'short')

def setup(app):
    app.add_html_math_renderer('mathml', (math(False), None), (math(True), None))
    app.connect('doctree-resolved', sort_tables)

html_math_renderer = 'mathml'
