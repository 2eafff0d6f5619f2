"The report: one page that needs nothing else, says what is true, escapes what is foreign, and changes nothing"
import base64, json, random, re, shutil, subprocess
from html.parser import HTMLParser
from io import BytesIO
from itertools import count

import jinja2, numpy as np, pandas as pd, pytest, torch
from fastai.vision.all import DataLoaders, ImageDataLoaders, Resize, TensorImage, TfmdDL
from matplotlib import pyplot as plt, text as mpl_text
from helpers import NoBN, fit, seed_all
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from ressl_fastai import report
from ressl_fastai.all import Learner, digits_dls, ressl_learner, small_resnet
from ressl_fastai.health import HealthMonitor
from ressl_fastai.evaluate import embed
from ressl_fastai.interpret import pictures
from ressl_fastai.loaders import item_name
from ressl_fastai.models import Encoder
from ressl_fastai.report import _few, render, template

void = {'meta', 'link', 'img', 'br', 'hr', 'input', 'wbr'}

class Page(HTMLParser):
    "What a browser would see: tags with their attributes, the text by tag, and tags that were not closed"
    def __init__(self, html):
        super().__init__()
        self.tags,self.texts,self.open,self.wrong = [],[],[],[]
        self.feed(html)
        self.close()
        self.wrong += self.open
    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in void: self.open.append(tag)
    def handle_endtag(self, tag):
        if not self.open or self.open.pop()!=tag: self.wrong.append('/'+tag)
    def handle_data(self, data): self.texts.append((self.open[-1] if self.open else '', data))
    def text(self, *tags): return [t for tag,t in self.texts if tag in tags]
    def images(self): return [a['src'] for tag,a in self.tags if tag=='img']

def not_self_contained(html):
    "Tags and addresses that run something or need something from outside"
    page = Page(html)
    bad = [tag for tag,attrs in page.tags if tag in ('script', 'iframe', 'object', 'embed', 'base')
           or any(k.startswith('on') for k in attrs)]
    bad += [v for _,attrs in page.tags for k,v in attrs.items() if k in ('src', 'href', 'srcset', 'action')
            and not re.match(r'data:|#', v)]
    return bad + re.findall(r'@import|url\(', ''.join(page.text('style')))

def pixels(src): return Image.open(BytesIO(base64.b64decode(src.removeprefix('data:image/png;base64,'), validate=True)))

def make(dls, path, arch=None, n=1, **kwargs):
    seed_all()
    learn = ressl_learner(dls, arch or NoBN(), queue_size=min(64, dls.train.n), n_hidden=16, dim=8, path=path, **kwargs)
    return fit(learn, n)

evil_file,evil_class = '<img src=x onerror=alert(1)>{{1}}&amp;', '<script>alert(1)</script>'

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Digits as files, with names that would run if they were not escaped"
    path = tmp_path_factory.mktemp('ims')
    for i,im in enumerate(load_digits().images[:60]):
        Image.fromarray((im*15).astype(np.uint8)).save(path/f'{evil_file} {i:02}.png')
    return path

@pytest.fixture(scope='module')
def unlabelled(folder):
    dls = ImageDataLoaders.from_path_func(folder, sorted(folder.glob('*.png')), lambda f: 0, valid_pct=0.2,
                                          item_tfms=Resize(8), bs=16, num_workers=0)
    dls = DataLoaders(*(dl.new(dataset=type(dl.dataset)(tls=[dl.dataset.tls[0]]), n_inp=1) for dl in dls.loaders),
                      path=folder)
    learn = make(dls, folder, small_resnet)
    return learn, learn.report(command='ressl_pretrain <b>x</b>').read_text()

@pytest.fixture(scope='module')
def labelled(tmp_path_factory):
    path = tmp_path_factory.mktemp('lab')
    df = pd.DataFrame({'name':range(150), 'label':[evil_class if o==0 else str(o) for o in load_digits().target[:150]]})
    for i,im in enumerate(load_digits().images[:150]): Image.fromarray((im*15).astype(np.uint8)).save(path/f'{i}.png')
    dls = ImageDataLoaders.from_df(df.assign(name=[f'{i}.png' for i in df.name]), path, valid_pct=0.3, seed=0,
                                   item_tfms=Resize(8), bs=16, num_workers=0)
    learn = make(dls, path, small_resnet, n=2, cbs=HealthMonitor())
    return learn, learn.report().read_text()

def sections(html): return {re.search('<h2>(.*?)</h2>', o)[1]:o for o in html.split('<section')[1:]}
def left_out(html): return {k for k,v in sections(html).items() if 'Left out: ' in v}

def test_page_is_whole_and_needs_nothing_else(labelled, unlabelled):
    for _,html in (labelled, unlabelled):
        page = Page(html)
        assert page.wrong==[] and not_self_contained(html)==[]
        assert len(page.images())>10
        for src in page.images(): assert min(pixels(src).size)>0
        assert all('alt' in a for tag,a in page.tags if tag=='img')
        assert 'prefers-color-scheme: dark' in html and 'width=device-width' in html

    assert Page('<div><p></div>').wrong and Page('<b>').wrong==['b']
    for bad in ('<img src="a.png">', '<link href="https://x/y.css">', '<script>1</script>', '<p onclick="1">',
                '<style>@import "x"</style>', '<style>a {background: url(x)}</style>'):
        assert not_self_contained(bad), bad
    with pytest.raises(Exception): pixels('data:image/png;base64,AAAA')

def test_only_what_cannot_be_made_is_left_out(labelled, unlabelled):
    assert left_out(labelled[1])=={'What to label first'}
    assert left_out(unlabelled[1])=={'Accuracy', 'Few labels'}

def test_names_are_text_never_markup(labelled, unlabelled):
    page = Page(unlabelled[1])
    assert sum(evil_file in t for t in page.text('td'))>20 and 'ressl_pretrain <b>x</b>' in page.text('code')
    assert any(evil_class in t for t in Page(labelled[1]).text('td'))
    args = dict(title=evil_class, sections=[dict(title='x', text=evil_class, rows=[(evil_file,evil_file)],
                                                   code=evil_class)],
                alarms=[evil_class], facts=[(evil_class, 1)])
    assert not_self_contained(render(**args))==[]

    raw = jinja2.Environment().from_string(template).render(**args)
    assert {'script', 'img'} <= set(not_self_contained(raw))

def test_numbers_are_those_of_the_learner(labelled):
    learn,html = labelled
    (x,y),(vx,vy) = (map(np.asarray, embed(learn, dl)) for dl in (learn.dls.train, learn.dls.valid))
    def unit(o): return o/np.linalg.norm(o, axis=1, keepdims=True)
    clf = KNeighborsClassifier(20, weights=lambda d: np.exp((1-d**2/2)/0.1)).fit(unit(x), y)
    row = re.search(r'<th scope="row">student</th><td>([\d.]+)</td>', sections(html)['Accuracy'])
    assert float(row[1])==pytest.approx((clf.predict(unit(vx))==vy).mean(), abs=1e-3)

    now = [o for o in learn.cbs if isinstance(o, HealthMonitor)][0].history[-1]
    for nm,v in now.items(): assert f'<th scope="row">{nm}</th><td>{v:.4g}</td>' in html.replace('<wbr>', '')
    for o in ('105 for training, 45 for validation', '8 x 8 pixels, 3 channels', 'small_resnet',
              '64 embeddings of width 8'): assert o in html

def test_nothing_about_the_learner_changes(labelled):
    learn,_ = labelled
    def state(): return (learn.model.state_dict(), learn.opt.state_dict(), [list(o) for o in learn.recorder.values],
                         learn.recorder.lrs, torch.get_rng_state(), np.random.get_state(),
                         random.getstate(), [m.training for m in learn.model.modules()],
                         [p.requires_grad for p in learn.model.parameters()],
                         [str(dl.after_batch) for dl in learn.dls.loaders], [id(o) for o in learn.cbs],
                         plt.get_fignums(), dict(plt.rcParams), learn.training)
    mine = plt.figure()
    before = BytesIO()
    torch.save(state(), before)
    learn.report('again.html', n=20)
    after = BytesIO()
    torch.save(state(), after)
    assert before.getvalue()==after.getvalue() and plt.gcf() is mine
    plt.close(mine)

    torch.rand(1)
    changed = BytesIO()
    torch.save(state(), changed)
    assert changed.getvalue()!=before.getvalue()

def test_lines_that_load_the_encoder_run(labelled, tmp_path):
    learn,html = labelled
    code = Page(sections(html)['How to use it']).text('code')[0]
    df = pd.DataFrame(dict(name=[f'{i}.png' for i in range(40)], label=[str(i%2) for i in range(40)]))
    labelled_dls = ImageDataLoaders.from_df(df, learn.path, item_tfms=Resize(8), bs=8, num_workers=0)
    scope = dict(learn=learn, labelled_dls=labelled_dls)
    exec(code, scope)
    assert all(torch.equal(a, b) for a,b in zip(scope['clf'].model[0].parameters(),
                                                learn.model.encoder[0].parameters()))
    assert 0<=scope['clf'].validate()[1]<=1

    again = learn.report(tmp_path/'b.html', n=20).read_text()
    assert 'learn.save_encoder' in code and 'learn.save_encoder' not in sections(again)['How to use it']

def test_a_part_keeps_pictures_and_names_together(labelled, unlabelled):
    for learn,_ in (labelled, unlabelled):
        dl,idxs = _few(learn.dls.train, 7)
        assert dl.n==7
        for i,im in zip(idxs, pictures(dl, range(7))):
            file = learn.path/item_name(learn.dls.train, i, learn.path)
            assert torch.equal((im[0]*255).round().byte(), torch.tensor(np.array(Image.open(file))))

class Plain:
    "A data set that is not fastai's"
    def __init__(self, n): self.n = n
    def __len__(self): return self.n
    def __getitem__(self, i): return TensorImage(torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(i))), i%2

def test_data_of_any_kind_and_size(tmp_path):
    for n,few in ((3, 2000), (40, 30)):
        dls = DataLoaders(TfmdDL(Plain(n), bs=2, shuffle=True, drop_last=True), TfmdDL(Plain(2), bs=2))
        learn = make(dls, tmp_path, guard=False)
        out = left_out(learn.report(n=few).read_text())
        assert 'What was run' not in out and 'Views' not in out and ('Neighbours' in out)==(n==3)

def test_a_learner_that_has_not_trained_or_is_broken(tmp_path):
    learn = ressl_learner(digits_dls(8), NoBN(), queue_size=64, n_hidden=16, dim=8, path=tmp_path)
    learn.model.encoder[0][0].weight.data.fill_(torch.nan)
    assert left_out(learn.report(n=30).read_text()) >= {'Curves', 'Health', 'Accuracy', 'Map'}
    with pytest.raises(ValueError, match='n must be'): learn.report(n=1)
    with pytest.raises(ValueError, match='in a folder that exists'): learn.report('no/such.html')
    learn.remove_cb(learn.ressl)
    with pytest.raises(ValueError, match='needs a ressl_learner'): learn.report()

check = """<iframe id="f" src="PAGE" style="width:390px; height:800px"></iframe><pre id="out"></pre><script>
f.onload = () => { const d = f.contentDocument, w = f.contentWindow; out.textContent = JSON.stringify({
  n: d.images.length, dead: [...d.images].filter(o => !(o.complete && o.naturalWidth > 0)).length,
  wide: d.documentElement.scrollWidth}) }
</script>"""

@pytest.mark.skipif(not shutil.which('chromium'), reason='needs chromium')
def test_in_a_browser(labelled, unlabelled, tmp_path):
    def look(html):
        (tmp_path/'page.html').write_text(html)
        (tmp_path/'check.html').write_text(check.replace('PAGE', 'page.html'))
        res = subprocess.run(['chromium', '--headless=new', '--no-sandbox', '--disable-gpu',
                              '--allow-file-access-from-files', '--enable-logging=stderr', '--v=0',
                              '--virtual-time-budget=5000',
                              f'--user-data-dir={tmp_path}/chromium', '--dump-dom', (tmp_path/'check.html').as_uri()],
                              capture_output=True, text=True, timeout=120)
        seen = json.loads(re.search(r'<pre id="out">(.*?)</pre>', res.stdout)[1])
        return seen, [o for o in res.stderr.splitlines() if 'CONSOLE' in o]
    for _,html in (labelled, unlabelled):
        seen,console = look(html)
        assert console==[] and seen['dead']==0 and seen['n']==len(Page(html).images()) and seen['wide']<=390

    seen,console = look('<img src="data:image/png;base64,AAAA"><p style="width:900px">x<script>nothing.here</script>')
    assert seen['dead']==1 and seen['wide']>390 and console

few = [o for o in report.report_sections if o[0] in ('What was run','Neighbours','Outliers','How to use it')]

def failed(html): return {k:o for k,o in sections(html).items() if 'This section failed' in o}

@pytest.mark.parametrize('error', [KeyError('x'), RuntimeError('out of <b>memory</b>'), MemoryError(),
                                   AttributeError('a'), OSError(28, 'No space left'), AssertionError()],
                         ids=lambda e: type(e).__name__)
def test_an_error_of_a_section_is_said_there_and_the_page_stands(labelled, error, monkeypatch):
    learn,_ = labelled
    plt.close('all')  # what other tests have left
    def fail(*args, **kwargs): raise error
    monkeypatch.setattr(Learner, 'show_neighbors', lambda *args, **kwargs: fail(plt.figure()))
    monkeypatch.setattr(Learner, 'find_outliers', fail)
    monkeypatch.setattr('ressl_fastai.report.report_sections', few)
    new = learn.report(n=30).read_text(encoding='utf-8')
    assert failed(new).keys()=={'Neighbours','Outliers'} and left_out(new)==set()
    assert set(sections(new))-{'Neighbours','Outliers'}=={'What was run','How to use it'}
    assert all(type(error).__name__ in o for o in failed(new).values())
    assert Page(new).wrong==[] and plt.get_fignums()==[]

def test_ctrl_c_in_a_section_stops_the_report_and_keeps_the_older_page(labelled, monkeypatch):
    learn,_ = labelled
    monkeypatch.setattr('ressl_fastai.report.report_sections', few)
    old = learn.report(n=20).read_bytes()
    def fail(*args, **kwargs): raise KeyboardInterrupt
    monkeypatch.setattr(Learner, 'show_neighbors', fail)
    with pytest.raises(KeyboardInterrupt): learn.report(n=20)
    assert (learn.path/'report.html').read_bytes()==old and not list(learn.path.glob('*.part'))

def test_images_that_cannot_be_read_any_more_cost_the_sections_that_need_them(tmp_path):
    path = tmp_path / 'ims'
    path.mkdir()
    for i,im in enumerate(load_digits().images[:60]): Image.fromarray((im*15).astype(np.uint8)).save(path/f'{i:02}.png')
    dls = ImageDataLoaders.from_path_func(path, sorted(path.glob('*.png')), lambda f: int(f.stem)%2, valid_pct=0.2,
                                          item_tfms=Resize(8), bs=16, num_workers=0)
    learn = make(dls, tmp_path, small_resnet, cbs=HealthMonitor())
    for o in path.glob('*.png'): o.write_bytes(b'')
    html = learn.report().read_text(encoding='utf-8')
    lost = failed(html).keys()|left_out(html)
    assert not lost & {'Curves', 'How to use it'} and 'small_resnet' in html
    assert lost >= {'Accuracy','Neighbours','Map','Duplicates'}
    assert any(re.search(r'\d\d\.png', sections(html)[o]) for o in lost)

odd = '$x_{', 'x$y$', '_c', '<b>&', '\U0001f431\u732b', '\udcff', 'long'*40, r'\$'

def test_names_are_drawn_letter_by_letter(tmp_path, recwarn):
    df = pd.DataFrame({'name':[f'{i}.png' for i in range(80)], 'label':[odd[i%8] for i in range(80)]})
    for i,im in enumerate(load_digits().images[:80]):
        Image.fromarray((im*15).astype(np.uint8)).save(tmp_path/f'{i}.png')
    dls = ImageDataLoaders.from_df(df, tmp_path, valid_pct=0.3, seed=0, item_tfms=Resize(8), bs=16, num_workers=0)
    learn = make(dls, tmp_path, small_resnet)
    html = learn.report(n=40).read_text(encoding='utf-8')
    assert failed(html)=={} and left_out(html)=={'What to label first'}
    assert [o for o in recwarn if 'Glyph' in str(o.message)]==[]
    assert any('\U0001f431\u732b' in t and 'x$y$' in t for t in Page(html).text('td'))

    legend = learn.plot_embeddings(method='pca').get_legend().get_texts()
    plt.gcf().canvas.draw()
    shown = {t.get_text() for t in legend}
    assert len(legend)==8 and {r'\$x_{', r'x\$y\$', ' _c', '<b>&', '\ufffd', 'longlonglonglonglonglon…'} <= shown
    assert all(mpl_text.Text(text=t)._preprocess_math(t)[1] is False for t in shown)
    plt.close('all')
    learn.show_neighbors(12)
    plt.gcf().canvas.draw()
    assert max(len(t) for ax in plt.gcf().axes for t in ax.get_title().splitlines())<20
    plt.close('all')

def test_images_are_embedded_once_and_every_section_says_its_seconds(labelled, monkeypatch, recwarn):
    learn,counted,forward = labelled[0],[],Encoder.forward
    def count(self, x):
        counted.append(len(x))
        return forward(self, x)
    next(learn.model.encoder.parameters()).data.add_(1e-5)  # other weights than those of the reports before
    next(learn.model.teacher.parameters()).data.add_(1e-5)
    monkeypatch.setattr(Encoder, 'forward', count)
    html = learn.report().read_text(encoding='utf-8')
    assert sum(counted)==2*(45+105)
    learn.report()
    assert sum(counted)==2*(45+105)  # a second page embeds nothing
    seconds = r'<p class="quiet">\d+\.\d seconds</p>'
    assert all(re.search(seconds, o) for nm,o in sections(html).items() if nm not in left_out(html))
    assert '105 training and 45 validation images, spread evenly' in html
    assert not [o for o in recwarn if 'converge' in str(o.message)]

def test_relations_from_features_are_those_of_the_images(labelled):
    learn = labelled[0]
    features = tuple(embed(learn, learn.dls.train, teacher) for teacher in (False,True))
    a,b,c = (learn.image_relations(3, features=o) for o in ((None,None), features, features[::-1]))
    for who in ('student','teacher'): torch.testing.assert_close(a[who], b[who], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(a['student'], c['student'], atol=1e-3)   # the two are not the same here

def test_a_page_looks_at_fewer_large_images():
    def n(size): return report._images_for_a_page(DataLoaders(*[TfmdDL([(torch.zeros(3, size, size),)]*3, bs=2)]*2))
    assert [n(o) for o in (32, 96, 192, 500)]==[2000, 2000, 500, 200]

def test_a_section_of_ones_own(labelled, monkeypatch):
    def mine(learn, seen): return dict(text=f'{seen.dl.n} images', rows=[('a', 1)])
    monkeypatch.setattr('ressl_fastai.report.report_sections', [*few[:1], ('Mine', mine)])
    assert '105 images' in sections(labelled[0].report().read_text())['Mine']

def test_accuracies_stand_beside_raw_pixels_on_axes_from_0_to_1(labelled, monkeypatch):
    drawn,lines = [],report._lines
    def spy(title, levels={}, **ys):
        lines(title, levels, **ys)
        drawn.append((title, plt.gca().get_ylim(), levels))
    monkeypatch.setattr('ressl_fastai.report._lines', spy)
    html = labelled[0].report().read_text()
    pixels = re.search(r'<th scope="row">raw pixels</th><td>([\d.]+)</td>', sections(html)['Accuracy'])[1]
    (_,ylim,levels), = [o for o in drawn if o[0]=='knn_accuracy by epoch']
    assert ylim==(0,1) and f"{levels['raw pixels']:.3f}"==pixels and f'Raw pixels alone reach {pixels}' in html
    assert all(o[1]!=(0,1) for o in drawn if 'accuracy' not in o[0])  # control
    health = {o[0]:o[1] for o in drawn if o[0] in HealthMonitor.names}  # a small change looks small
    assert set(health)==set(HealthMonitor.names) and {o[0] for o in health.values()}=={0}
    assert health['feature_std'][1]==health['queue_freshness'][1]==1.05

def test_the_line_of_raw_pixels_has_the_labels_of_the_curve(labelled):
    learn = labelled[0]
    assert set(report._pixels_level(learn, report._look(learn, 200)))=={'raw pixels'}
    assert set(report._pixels_level(learn, report._look(learn, 30)))=={'raw pixels, 30 labels'}  # images would be read
    text = report.accuracy_section(learn, report._look(learn, 30))
    assert 'has the labels of all 105' in text['text'] and text['warnings']==[]
    cached = ressl_learner(digits_dls(8), NoBN(), queue_size=64, n_hidden=16, dim=8, path=learn.path)
    some,whole = (report._look(cached, n) for n in (30,2000))
    assert report._pixels_level(cached, some)=={'raw pixels':report._knn(whole, 'raw pixels')}
    assert report._knn(some, 'raw pixels')!=report._knn(whole, 'raw pixels')  # control

def test_an_accuracy_that_falls_with_the_loss_is_said():
    def said(knn, loss=(3.,2.,1.), n=1000):
        return report.fallen_accuracy(pd.DataFrame(dict(train_loss=loss, valid_loss=1., knn_accuracy=knn)), n)
    text, = said([0.5,0.7,0.6])
    assert 'fell from 0.700 in epoch 2 to 0.600' in text and 'milder colour' in text
    assert said([0.75,0.75,35/48], n=48)==said([0.5,0.7,0.6], n=80)==[]  # one image of 48; below 0.102
    assert said([0.5,0.7,0.6], n=90)                                     # above 0.097
    assert said([0.5,0.6,0.7])==said([0.5,0.7,0.69])==said([float('nan')]*3)==said([0.5,0.7,0.6], (3.,1.,2.))==[]

def test_a_path_of_ones_own_is_made(tmp_path):
    learn = ressl_learner(digits_dls(8), NoBN(), queue_size=64, n_hidden=16, dim=8, path=tmp_path/'a'/'results')
    assert learn.report(n=20)==tmp_path/'a'/'results'/'report.html' and learn.path.is_dir()
    learn.export('learner.pkl')

def test_features_that_are_no_better_than_what_costs_nothing_are_named():
    def said(accuracy, untrained): return report.no_better(accuracy, {'raw pixels':0.5, 'the random encoder':untrained})
    assert said(0.6, 0.55)==[]
    for accuracy in (0.5,0.4):
        text, = said(accuracy, 0.3)
        assert f'({accuracy:.3f})' in text and 'those of raw pixels (0.500): ' in text and 'Small, grey' in text
    text, = said(0.6, 0.7)
    assert 'those of the random encoder (0.700): ' in text and 'pixels' not in text
    text, = said(0.4, 0.7)
    assert 'those of raw pixels (0.500) and of the random encoder (0.700): ' in text

def test_a_report_that_takes_long_has_a_bar_and_others_have_none(labelled, monkeypatch):
    class Bar:
        def __init__(self, total, leave): self.at,self.total = [],len(total)
        def update(self, n): self.at.append((n, getattr(self, 'comment', '')))
    def bars(seconds):
        clock,made = count(0, seconds),[]
        def progress_bar(*args, **kwargs):
            made.append(Bar(*args, **kwargs))
            return made[-1]
        monkeypatch.setattr(report, 'report_sections', few)
        monkeypatch.setattr(report, 'perf_counter', lambda: next(clock))
        monkeypatch.setattr(report, 'progress_bar', progress_bar)
        labelled[0].report(n=20)
        return made
    bar, = bars(3)
    assert bar.at==[(0,''), *((i, f'report: {o[0]}') for i,o in enumerate(few)), (len(few), f'report: {few[-1][0]}')]
    assert bars(0.01)==[]
    with labelled[0].no_bar(): assert bars(3)==[]

def test_duplicates_are_a_row_for_each_group(labelled, monkeypatch):
    found = pd.DataFrame({'group':[0]*7+[1]*2, 'index':range(9)})
    monkeypatch.setattr(Learner, 'find_duplicates', lambda self, **kwargs: found)
    seen = report._look(labelled[0], 20)
    rows = report.duplicates_section(labelled[0], seen)['rows']
    assert rows==[('group 1', ', '.join(seen.names[:5])), ('group 2', ', '.join(seen.names[7:9]))]

def test_the_words_say_what_is_good(labelled):
    health = sections(labelled[1])['Health'].replace('<wbr>', '')
    assert set(re.findall(r'<th scope="row">(\w+)</th>', health))==set(HealthMonitor.names)
    assert 'only near 1 is it collapse' in health
