"""A real browser for the tests: Chromium without a window, and what it says about a page."""

import shutil
from typing import Any, NamedTuple

import pytest

_BROWSERS = ('chromium', 'chromium-browser', 'google-chrome')
_OPTIONS = (
    '--headless=new',
    '--no-sandbox',  # As root in a container there is none.
    '--disable-dev-shm-usage',
    '--disable-gpu',
    '--hide-scrollbars',
    '--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1',  # A page of this machine asks nobody else.
)
# Of every element with text of its own: its colour, and what lies behind it, from the element outwards.
_COLORS = """
const transparent = /^rgba\\(.*, 0\\)$/, found = [];
for (const element of document.body.querySelectorAll('*')) {
  const own = [...element.childNodes].filter(node => node.nodeType === Node.TEXT_NODE).map(node => node.data.trim());
  if (!own.join('')) continue;
  let behind = element;
  while (behind && transparent.test(getComputedStyle(behind).backgroundColor)) behind = behind.parentElement;
  const background = behind ? getComputedStyle(behind).backgroundColor : null;
  found.push([element.localName, own.join(' '), getComputedStyle(element).color, background]);
}
return found;
"""
_WIDTHS = """
const width = image => image.decode().then(() => image.naturalWidth, () => 0);
Promise.all([...document.images].map(width)).then(arguments[0]);
"""


class Words(NamedTuple):
    """Some text of a page: its HTML element, what it says, and its contrast to what lies behind it, 1 to 21."""

    element: str
    text: str
    contrast: float


def open_browser() -> Any:
    """Starts Chromium and returns Selenium's driver of it; skips the test where there is none."""
    selenium = pytest.importorskip('selenium.webdriver', reason='no browser: selenium is not installed')
    program = next(filter(None, map(shutil.which, _BROWSERS)), None)
    driver = shutil.which('chromedriver')
    if not program or not driver:
        pytest.skip('no browser: chromium and chromedriver are not installed')
    options = selenium.ChromeOptions()
    options.binary_location = program
    for option in _OPTIONS:
        options.add_argument(option)
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL'})
    return selenium.Chrome(options=options, service=selenium.ChromeService(driver))


def show(browser: Any, address: str, width: int = 1200, scheme: str = 'light') -> None:
    """Opens a page in a window of a width in pixels and in a colour scheme, 'light' or 'dark'."""
    size = dict(width=width, height=900, deviceScaleFactor=1, mobile=False)
    browser.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', size)
    media = {'features': [{'name': 'prefers-color-scheme', 'value': scheme}]}
    browser.execute_cdp_cmd('Emulation.setEmulatedMedia', media)
    browser.get_log('browser')  # Empties the log.
    browser.get(address)


def complaints(browser: Any) -> list[str]:
    """What the console says about the page that is shown: errors and warnings."""
    return [entry['message'] for entry in browser.get_log('browser') if entry['level'] in ('SEVERE', 'WARNING')]


def pictures(browser: Any) -> list[int]:
    """The widths in pixels of all pictures of the page that is shown; 0 for one that cannot be shown."""
    return browser.execute_async_script(_WIDTHS)


def words(browser: Any) -> list[Words]:
    """All text of the page that is shown, also that of closed sections, with its contrast by WCAG 2."""
    found = browser.execute_script(_COLORS)
    return [Words(name, text, _contrast(color, behind)) for name, text, color, behind in found]


def _contrast(color: str, background: str | None) -> float:
    light, dark = sorted((_luminance(color), _luminance(background or 'rgb(255, 255, 255)')), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _luminance(color: str) -> float:
    """The relative luminance, 0 to 1, of a computed colour; it must be opaque: 'rgb(RED, GREEN, BLUE)'."""
    assert color.startswith('rgb('), color
    parts = [int(part) / 255 for part in color[4:-1].split(',')]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
