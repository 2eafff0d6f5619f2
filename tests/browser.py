"""Chromium without a window, driven over a pipe by its DevTools protocol: it needs no package. `faults(page)` is what a
reader would call broken. `with Browser() as b: b.open(url)`."""

import base64, fcntl, functools, http.server, json, os, shutil, subprocess, tempfile, threading, time
from contextlib import contextmanager

chromium = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')

@contextmanager
def served(folder):
    "The address of a folder, as a web server has it"
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://localhost:{server.server_address[1]}'
    server.shutdown()
    server.server_close()


class Browser:
    "One page of Chromium"
    def __enter__(self):
        self.profile = tempfile.TemporaryDirectory()
        to_read,self.out = os.pipe()
        self.inp,to_write = os.pipe()
        flags = ['--headless=new', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage',
                 '--remote-debugging-pipe', f'--user-data-dir={self.profile.name}', '--no-first-run',
                 '--disable-extensions', '--hide-scrollbars']
        def where_chromium_looks():
            "In the child: the pipe as files 3 and 4"
            ends = [fcntl.fcntl(o, fcntl.F_DUPFD, 10) for o in (to_read,to_write)]
            for o,to in zip(ends, (3,4)): os.dup2(o, to)
        self.process = subprocess.Popen([chromium, *flags, 'about:blank'], stdout=subprocess.DEVNULL,
                                        stderr=subprocess.DEVNULL, pass_fds=(3,4), preexec_fn=where_chromium_looks)
        os.close(to_read)
        os.close(to_write)
        self.n,self.rest,self.events,self.session = 0,b'',[],None
        target = self('Target.createTarget', url='about:blank')['targetId']
        self.session = self('Target.attachToTarget', targetId=target, flatten=True)['sessionId']
        for domain in ('Page','Runtime','Log','Network'): self(f'{domain}.enable')
        return self

    def __exit__(self, *args):
        self.process.terminate()
        self.process.wait(20)
        os.close(self.out)
        os.close(self.inp)
        self.profile.cleanup()

    def _message(self):
        while b'\0' not in self.rest:
            if not (new := os.read(self.inp, 2**20)): raise ConnectionError("Chromium is gone")
            self.rest += new
        one,_,self.rest = self.rest.partition(b'\0')
        return json.loads(one)

    def __call__(self, method, **params):
        "Send a command, return its result; what happens meanwhile is kept in `events`"
        self.n += 1
        session = dict(sessionId=self.session) if self.session else {}
        os.write(self.out, json.dumps(dict(id=self.n, method=method, params=params, **session)).encode()+b'\0')
        while True:
            o = self._message()
            if o.get('id')==self.n:
                if 'error' in o: raise RuntimeError(f"{method}: {o['error']}")
                return o['result']
            self.events.append(o)

    def js(self, code):
        "The value of an expression in the page, waited for if it is a promise"
        res = self('Runtime.evaluate', expression=code, returnByValue=True, awaitPromise=True, userGesture=True)
        if 'exceptionDetails' in res: raise RuntimeError(f"{code[:80]}: {res['exceptionDetails']}")
        return res['result'].get('value')

    def look(self, width=1280, dark=False, height=900):
        "Width of the window in pixels, and the reader's colours"
        self('Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=1, mobile=width<600)
        scheme = dict(name='prefers-color-scheme', value='dark' if dark else 'light')
        self('Emulation.setEmulatedMedia', features=[scheme])

    def open(self, url, seconds=60):
        "Load a page and all its pictures"
        self.events = []
        self('Page.navigate', url=url)
        end = time.monotonic()+seconds
        while not any(o.get('method')=='Page.loadEventFired' for o in self.events):
            if time.monotonic()>end: raise TimeoutError(f"{url} was not loaded in {seconds} seconds")
            self.js('1')
            time.sleep(0.02)

    def errors(self):
        "What a console would show in red since `open`"
        res = []
        for o in self.events:
            p = o.get('params', {})
            if o.get('method')=='Runtime.exceptionThrown': res.append(p['exceptionDetails']['text'])
            elif o.get('method')=='Runtime.consoleAPICalled' and p['type'] in ('error','assert'):
                res.append(str([a.get('value') for a in p['args']]))
            elif o.get('method')=='Log.entryAdded' and p['entry']['level']=='error': res.append(p['entry']['text'])
        return res

    def picture(self, file):
        "A PNG of what is seen"
        import base64
        data = self('Page.captureScreenshot', format='png')['data']
        with open(file, 'wb') as f: f.write(base64.b64decode(data))


images = "[...document.images].filter(o => !o.complete || !o.naturalWidth).map(o => o.src.slice(0, 80))"

wide = """(() => { const w = document.documentElement.clientWidth;
return document.documentElement.scrollWidth > w+1 ? [document.documentElement.scrollWidth + ' of ' + w] : []; })()"""

# contrast of texts with what lies behind them, as WCAG 2 has it; below 3 a text is hard to read
contrast = """(() => {
const probe = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
const rgba = c => { probe.clearRect(0, 0, 1, 1); probe.fillStyle = c; probe.fillRect(0, 0, 1, 1);
                    return [...probe.getImageData(0, 0, 1, 1).data]; };
const light = c => { const [r,g,b] = c.map(v => v/255).map(v => v <= 0.04045 ? v/12.92 : ((v+0.055)/1.055)**2.4);
                     return 0.2126*r + 0.7152*g + 0.0722*b; };
const behind = e => { for (; e; e = e.parentElement) { const c = rgba(getComputedStyle(e).backgroundColor);
                      if (c[3] > 250) return c.slice(0, 3); }
                      return [255,255,255]; };
const seen = {};
for (const e of document.querySelectorAll('p,li,td,th,h1,h2,h3,pre,code,span,a,summary,figcaption,label')) {
    const own = [...e.childNodes].some(n => n.nodeType==3 && n.data.trim());
    if (!own || !e.checkVisibility({opacityProperty: true, visibilityProperty: true})) continue;
    const text = rgba(getComputedStyle(e).color).slice(0, 3), back = behind(e);
    const [a,b] = [light(text), light(back)].sort((x,y) => y-x), ratio = (a+0.05)/(b+0.05);
    if (ratio < 3) seen[e.tagName + ' ' + e.className + ' ' + ratio.toFixed(1)] = e.textContent.trim().slice(0, 30);
}
return Object.entries(seen).map(o => o.join(': '));
})()"""

def faults(browser, url, width=390):
    "By name of the fault where it is found: on a phone, in light and in dark"
    browser.look(width)
    browser.open(url)
    looks = {'not loaded':images, 'wider than the window':wide, 'hard to read':contrast}
    res = {k:browser.js(code) for k,code in looks.items()}
    browser.look(width, dark=True)
    res['hard to read in the dark'] = browser.js(contrast)
    res['errors'] = browser.errors()
    return {k:v for k,v in res.items() if v}

def copied(browser, button):
    "What is on the clipboard after a click on the first `button`, a CSS selector; None where there is none"
    browser('Emulation.setFocusEmulationEnabled', enabled=True)
    browser('Browser.grantPermissions', permissions=['clipboardReadWrite','clipboardSanitizedWrite'])
    if not browser.js(f"!!document.querySelector('{button}')"): return None
    browser.js("navigator.clipboard.writeText('nothing')")
    browser.js(f"document.querySelector('{button}').click()")
    time.sleep(0.3)
    return browser.js("navigator.clipboard.readText()")
