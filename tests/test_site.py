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

def test_what_only_sets_up_stays_out_and_what_says_so_is_folded():
    build = load('build')
    assert build.shown({}, "plt.rcParams['figure.dpi'] = 60\nset_seed(1)") == ['remove-input']
    assert build.shown({'echo':'false'}, 'x = 1') == ['remove-input']
    assert build.shown({'code-fold':'true'}, 'x = 1') == ['hide-input']
    assert build.shown({}, "set_seed(1)\nx = 1") == []

def test_lines_of_losses_become_one_table_and_other_lines_stay():
    build = load('build')
    def line(*texts): return dict(output_type='stream', name='stdout', text=[f'{o}\n' for o in texts])
    losses = [line("[0, 3.5, 2.25, 0.5, '00:03']"), line("[1, 3.25, 2.0, 0.75, '00:02']")]
    made = build.with_tables([*losses, line('done')])
    assert [o['output_type'] for o in made] == ['display_data','stream']
    html = made[0]['data']['text/html']
    assert html.count('<tr>')==3 and '<td>3.250</td>' in html and "<th>train_loss</th>" in html
    assert build.with_tables([line('[0, 1]')]) == [line('[0, 1]')]

def test_title_and_description_of_a_page():
    build = load('build')
    title,what = build.about('# Quickstart\n> From a folder\n> to a classifier.')
    assert (title, what) == ('Quickstart','From a folder to a classifier.')
    assert build.about('# losses\n\nThe loss.') == ('losses','The loss.')
