"""What looks at the site finds what is wrong with it: each check is given a site with one fault, and one without."""
import importlib.util
from pathlib import Path

import pytest

root = Path(__file__).resolve().parent.parent

def load(name):
    spec = importlib.util.spec_from_file_location(name, root/'tools'/'site'/f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

check = load('check')

good = '''<h1 id="title">T</h1><span id="relu"></span><a href="sub/b.html#there">b</a><a href="#title">up</a>
<a href="https://example.org/none">elsewhere</a><img src="a.png" alt="two views">'''

@pytest.fixture
def site(tmp_path):
    (tmp_path/'sub').mkdir()
    (tmp_path/'a.png').write_bytes(b'')
    (tmp_path/'sub'/'b.html').write_text('<h2 id="there">B</h2><a href="../a.html">a</a>')
    def make(text):
        (tmp_path/'a.html').write_text(text)
        return tmp_path,{'a.html': check.Page(text), 'sub/b.html': check.Page((tmp_path/'sub'/'b.html').read_text())}
    return make

def test_a_good_site_has_no_fault(site):
    folder,pages = site(good)
    assert check.dead_links(folder, pages) == []
    assert check.bad_pictures(folder, pages) == []
    assert check.lost_symbols(pages, [('a.html','ReLU')]) == []
    assert check.machine_paths({'a.html': good}) == []

@pytest.mark.parametrize('old,new,address', [('sub/b.html#there','sub/c.html','sub/c.html'),
    ('#there','#here','sub/b.html#here'), ('"#title"','"#titel"','#titel')])
def test_a_dead_link_is_found(site, old, new, address):
    folder,pages = site(good.replace(old, new))
    assert check.dead_links(folder, pages) == [('a.html', address)]

@pytest.mark.parametrize('old,new', [('a.png','b.png'), ('two views',''), ('two views','_images/0.png')])
def test_a_picture_without_file_or_text_is_found(site, old, new):
    folder,pages = site(good.replace(old, new))
    assert len(check.bad_pictures(folder, pages)) == 1

def test_a_symbol_without_entry_and_a_path_of_a_machine_are_found(site):
    _,pages = site(good)
    lost = [('a.html','relation'), ('c.html','relu')]
    assert check.lost_symbols(pages, [*lost, ('a.html','ReLU')]) == lost
    assert check.machine_paths({'a.html': 'saved in /home/me/run/x.pth'}) == [('a.html','/home/me/run/x.pth')]

def test_the_alternative_text_of_a_figure_is_a_sentence_that_stands_before_it():
    build = load('build')
    assert build.first_sentence('With *several* crops the [student](a.html) sees more. And so on.') == \
        'With several crops the student sees more.'
    options = {'echo':'false','fig-alt':'"views"'}
    assert build.directives('#| echo: false\n#| fig-alt: "views"\nx = 1') == (options, 'x = 1')
