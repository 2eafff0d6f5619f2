import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

cfg = ConfigParser(delimiters=['='])
cfg.read('settings.ini', encoding='utf-8')
cfg = cfg['DEFAULT']
init = Path(cfg['lib_name'], '__init__.py').read_text(encoding='utf-8')

readme = Path('README.md').read_text(encoding='utf-8')  # on PyPI its links and pictures are those of the repository
home = 'https://github.com/ressl-fastai/ressl_fastai'
def absolute(m): return f"{m[1]}{home}/{'raw' if m[1][0]=='!' else 'blob'}/main/"
readme = re.sub(r'(!?\[[^\]]*\]\()(?!https?:)', absolute, readme)

setup(
    version=re.search(r'^__version__ = "(.+)"$', init, flags=re.M)[1],
    description=cfg['description'],
    long_description=readme,
    long_description_content_type='text/markdown',
    author=cfg['author'],
    license_expression=cfg['license'],
    keywords=cfg['keywords'].split(),
    python_requires=f">={cfg['min_python']}",
    classifiers=cfg['classifiers'].strip().splitlines(),
    packages=[cfg['lib_name']],
    package_data={cfg['lib_name']: ['py.typed']},
    install_requires=cfg['requirements'].split(),
    extras_require={k.removesuffix('_requirements'): v.split() for k,v in cfg.items() if k.endswith('_requirements')},
    entry_points={'console_scripts': cfg['console_scripts'].split(), 'nbdev': [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"]},
)
