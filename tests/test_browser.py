"""The site and a report as a reader's browser has them. Skipped in sight where there is no Chromium; the site is
looked at where `make docs` has made it. Each fault is found in a page that has it, and in no good one."""
import re
from pathlib import Path

import pytest

from browser import Browser, chromium, copied, faults, served
from helpers import digits_dls, fit, make

from ressl_fastai import report  # learn.report

root = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not chromium, reason='no chromium: apt-get install chromium')

@pytest.fixture(scope='module')
def browser():
    with Browser() as b: yield b

good = '''<!doctype html><meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">
<style>:root {color-scheme: light dark} body {background: white; color: black}
@media (prefers-color-scheme: dark) { body {background: black; color: white} }</style>
<img src="data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7" alt="a dot"><p>text</p>
<button onclick="navigator.clipboard.writeText('some code')">copy</button>'''

def test_a_good_page_has_no_fault(browser, tmp_path):
    (tmp_path/'a.html').write_text(good)
    with served(tmp_path) as url:
        assert faults(browser, f'{url}/a.html') == {}
        assert copied(browser, 'button') == 'some code'
        assert copied(browser, 'button.none') is None

@pytest.mark.parametrize('old,new,fault', [('<p>', '<script>throw Error("x")</script><p>', 'errors'),
    ('<p>', '<script>console.error("x")</script><p>', 'errors'), ('data:image/gif', 'none.gif?', 'not loaded'),
    ('<p>', '<p style="width: 600px">', 'wider than the window'), ('color: black', 'color: #ccc', 'hard to read'),
    ('color: white}', 'color: #333}', 'hard to read in the dark')])
def test_a_fault_is_found(browser, tmp_path, old, new, fault):
    (tmp_path/'a.html').write_text(good.replace(old, new))
    with served(tmp_path) as url: assert fault in faults(browser, f'{url}/a.html')

def test_a_button_that_does_not_copy_is_found(browser, tmp_path):
    (tmp_path/'a.html').write_text(good.replace('some code', 'other code'))
    with served(tmp_path) as url:
        faults(browser, f'{url}/a.html')
        assert copied(browser, 'button') != 'some code'

@pytest.mark.skipif(not (root/'_docs'/'index.html').exists(), reason='no site: make docs')
def test_the_site(browser):
    pages = [p.relative_to(root/'_docs').as_posix() for p in sorted((root/'_docs').rglob('*.html'))]
    with served(root/'_docs') as url:
        found = {page:o for page in pages if (o := faults(browser, f'{url}/{page}'))}
        assert not found
        browser.open(f'{url}/index.html')
        code = browser.js("document.querySelector('div.highlight pre').textContent")
        assert code.strip() and copied(browser, 'button.copybtn').strip()==code.strip()

def test_a_report(browser, tmp_path):
    learn = make(digits_dls(8, bs=64), path=tmp_path)
    fit(learn)
    learn.report('report.html')
    with served(tmp_path) as url: assert faults(browser, f'{url}/report.html') == {}
    assert not re.search(r'<button', (tmp_path/'report.html').read_text())  # nothing in it to copy with
